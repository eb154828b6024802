"""Tools that look at models and checkpoints and change nothing: forecast, inspect, audit."""
