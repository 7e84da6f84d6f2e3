"""A session on the real stack: launch, workload, model."""
