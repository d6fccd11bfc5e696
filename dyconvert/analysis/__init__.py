"""What was gained: figures about a model, as data."""
