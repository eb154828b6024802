"""Decide what each tensor of a model gets, from its tape and the header of a checkpoint."""
