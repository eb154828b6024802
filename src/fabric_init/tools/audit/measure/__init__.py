"""Measure a model for an audit: its activations, first loss and the cost of its init."""
