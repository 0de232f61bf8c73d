"""What one node asks another, and how it answers."""
