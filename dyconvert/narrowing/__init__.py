"""Fewer channels: which to keep together, and the weights that reconstruct the original's outputs."""
