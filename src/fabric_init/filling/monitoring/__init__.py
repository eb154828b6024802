"""What is shown and checked while a model is filled; no value depends on it."""
