"""Recipes: their keys, reading and checking them, and those that come with the package."""
