"""The two roles at work, what is kept while they are exchanged, and the exchange."""
