"""Training by a recipe: the module, the optimizer, the schedules, and the files that a run writes."""
