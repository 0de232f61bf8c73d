"""A node: one process, its settings, its control socket, and what runs in it in which order."""
