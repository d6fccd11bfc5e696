"""Figures about a model, as data."""
