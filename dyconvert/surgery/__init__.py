"""Turns a static model into a dynamic one, and back: watch it run, plan, expand the weights, hook the blocks."""
