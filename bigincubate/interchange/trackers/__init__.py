"""Copy the metrics of a run to an experiment tracker (W&B, MLflow) or to CSV files."""
