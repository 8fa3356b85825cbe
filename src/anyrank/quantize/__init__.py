"""A model in few bits: the codes are chosen, or taken over, and written one tensor at a time."""
