"""Tables of runs: one recipe, with changes and seeds."""
