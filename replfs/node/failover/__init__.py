"""Which node is the primary, decided by an operator: promotion, switchover, split brain."""
