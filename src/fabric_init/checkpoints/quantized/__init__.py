"""Checkpoints whose weights are quantized, as plain weights: each scheme in a file of its own."""
