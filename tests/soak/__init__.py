"""Faults without end under writers that never stop: short in the suite, of any length by hand."""
