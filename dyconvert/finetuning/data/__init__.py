"""What a recipe reads: images, their labels, and their augmentation."""
