"""Training: from a composed configuration to a run with checkpoints and metrics."""
