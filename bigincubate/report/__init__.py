"""Reports on runs: status, verification, tables, the page of a run, comparisons. Reads run directories only."""
