"""Ranks: the process group, the watchdog over it, stop signals. It knows neither Slurm nor any launcher."""
