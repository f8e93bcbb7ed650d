"""Storage of a run: leases on its directories, resume checkpoints, and the artifacts that phases produce."""
