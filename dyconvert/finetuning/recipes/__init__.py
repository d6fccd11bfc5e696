"""What a recipe says: its keys, how it is read and checked, and the recipes that come with the package."""
