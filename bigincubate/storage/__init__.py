"""Files of a run: the run directory, leases, checkpoints, artifacts."""
