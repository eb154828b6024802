"""Is the init any good: what the tape, and one pass with a batch, tell about it."""
