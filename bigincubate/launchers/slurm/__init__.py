"""Slurm: submit jobs, follow them, requeue them."""
