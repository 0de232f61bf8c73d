"""The command line: parsing, exit codes, progress. Nothing below this floor prints."""
