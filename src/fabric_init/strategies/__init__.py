"""How each Lightning strategy keeps a model's tensors."""
