"""Training: data, the rank drawn per step, the trainer, the run folder."""
