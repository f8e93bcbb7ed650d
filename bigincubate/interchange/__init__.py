"""Models in other forms: exported folders, checkpoints of the official implementation, pretrained models."""
