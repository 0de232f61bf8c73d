"""What an operator sees and says: the control socket, the status, metrics, events, the end."""
