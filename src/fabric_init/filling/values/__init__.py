"""The values of a plan's tensors: read, replayed, or computed from what is read."""
