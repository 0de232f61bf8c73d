"""The pure floor: no I/O, no clock, no trio, no sockets. Inputs in, decisions out."""
