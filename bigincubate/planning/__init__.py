"""Plan a run: its phases, their costs, memory and time, and the files that a run needs before it computes."""
