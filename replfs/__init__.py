"""A FUSE filesystem that keeps a directory synchronously replicated on other machines."""

__version__ = "0.1.0"
