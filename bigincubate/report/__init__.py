"""Reports on runs: status, verification, tables, HTML reports, comparisons. They only read run directories."""
