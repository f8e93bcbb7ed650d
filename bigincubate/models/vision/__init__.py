"""Vision models of timm: the supported families, and how they are built."""
