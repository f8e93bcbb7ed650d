"""Tasks: inputs, targets, losses and metrics. No other package depends on what they are."""
