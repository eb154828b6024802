"""Read pickles without running code, and with bounded work."""
