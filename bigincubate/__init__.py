"""Deep Incubation as a system: grow a large model from modules that train alone."""

__version__ = "0.2.0"
