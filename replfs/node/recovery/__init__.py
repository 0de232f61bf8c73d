"""What a power loss may take: common checkpoints before it, fetching it back after it."""
