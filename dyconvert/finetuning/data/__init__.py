"""Reads a recipe's data: images, their labels, and their augmentation."""
