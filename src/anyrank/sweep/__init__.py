"""Sweep: the loss or the tasks of every rank, the rank to choose or one per layer, the report."""
