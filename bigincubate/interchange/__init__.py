"""Import and export models: exported folders, checkpoints of the official implementation, pretrained models."""
