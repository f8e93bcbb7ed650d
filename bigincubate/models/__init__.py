"""Models: how they are cut into modules, and how tensors move between depths. Families of timm are in `vision`."""
