"""Models: partitions, hybrids, and tensors of models of different depths. `vision` has the timm families."""
