"""A secondary's copy: what comes is applied, put right, and kept."""
