"""Likely fixes for a checkpoint that does not fit; each is tried before an error proposes it."""
