"""Sweep: the loss of every rank, the rank to choose or one per layer, the table and the picture."""
