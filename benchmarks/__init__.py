"""Measurements of replfs beside other filesystems: `python -m benchmarks --help`."""
