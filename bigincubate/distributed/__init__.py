"""Process group, watchdog, logging and stop signals of the ranks, independent of Slurm and other launchers."""
