"""The local store: the tree, its objects' ids, durable state. Nothing here knows FUSE or a peer."""
