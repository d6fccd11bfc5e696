"""Each private API of torch that dyconvert uses, once, with its reason and what breaks it.

No other file of the package uses one. `tests/test_torch_internals.py` calls each, and fails with its name where a new
torch differs.
"""
