"""Sweep: the loss of every rank, the rank to choose, the table and the picture."""
