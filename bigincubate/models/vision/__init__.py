"""Vision models of timm: which families are supported, and how they are built."""
