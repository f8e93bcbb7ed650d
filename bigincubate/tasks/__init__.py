"""Tasks: the only package that knows inputs, targets, losses and metrics."""
