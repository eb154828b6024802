"""What a user gets wrong in a load, and what a load must not do: each an error before memory is allocated."""
