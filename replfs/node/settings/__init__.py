"""What a node is told before it begins: its options, and where its run directory is."""
