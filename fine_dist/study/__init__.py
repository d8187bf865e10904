"""Studies: a graph of runs, what to run, follow and collect, as data."""
