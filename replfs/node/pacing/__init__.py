"""How fast, and how many at a time: giving way, rates, crews, shared flushes."""
