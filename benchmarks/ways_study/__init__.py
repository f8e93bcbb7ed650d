"""The parts of `benchmarks/ways.py`: definition, lengths, log, trials, statistics, and the page with the results."""
