"""Whole training stacks, as their users write them."""
