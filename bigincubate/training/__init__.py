"""Train one phase: build its components, run the training loop, record the attempt."""
