"""Train one phase: build it, run its steps, record the attempt."""
