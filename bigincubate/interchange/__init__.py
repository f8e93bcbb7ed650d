"""Exchange with other programs.

Exported folders, checkpoints of the official implementation, pretrained models; metrics for experiment trackers.
"""
