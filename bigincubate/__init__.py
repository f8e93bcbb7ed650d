"""Deep Incubation: train a large model as modules that are trained separately, then joined."""

__version__ = "0.2.0"
