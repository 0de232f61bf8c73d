"""Comparing: a peer with this store while both are in use, and this store with what it was."""
