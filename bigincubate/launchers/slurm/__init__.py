"""Submit, monitor and requeue Slurm jobs."""
