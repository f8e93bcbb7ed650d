"""Deep Incubation as a system: grow a large model from modules that train alone."""

__version__ = "0.2.0"

FEED = "BIGINCUBATE_FEED"  # the variable that names the loader that modules share, where they are co-trained
