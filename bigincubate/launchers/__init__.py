"""Start the phases of a run, on this machine or as Slurm jobs."""
