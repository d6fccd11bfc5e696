"""Turns a static model into a dynamic one: find the blocks, plan, expand the weights, rewrite."""
