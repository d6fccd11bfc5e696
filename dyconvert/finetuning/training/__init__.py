"""How a recipe trains: the module, the optimizer, the schedules, and what a run writes."""
