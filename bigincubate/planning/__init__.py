"""Plan a run: its phases, their cost, memory and time, and the files to write before training."""
