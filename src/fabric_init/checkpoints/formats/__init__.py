"""One reader for each format of checkpoints."""
