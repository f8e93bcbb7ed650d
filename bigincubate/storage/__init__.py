"""Storage: the files of a run directory."""
