"""Optimizer, learning-rate schedule and moving average of a phase."""
