"""The files of a run: run directory, leases, checkpoints and artifacts."""
