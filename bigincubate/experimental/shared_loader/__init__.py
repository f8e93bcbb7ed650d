"""Co-training: modules that train at the same time share one loader."""
