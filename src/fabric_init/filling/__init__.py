"""Execute a plan: give each tensor of a model its value once, in the memory where its strategy keeps it."""
