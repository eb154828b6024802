"""Weights that a library packs or wraps, such as quantized ones: planned for and filled from the plain ones."""
