"""The resync: what a peer lacks is brought to it, while applications go on."""
