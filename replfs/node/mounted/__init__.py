"""What the kernel is answered: one session, and the volume or the replica behind it."""
