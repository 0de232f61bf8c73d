"""The way of a change to the peers: turn, policy, sending, and what they answer."""
