"""torch's pytrees: nested lists, tuples, dicts and registered classes, and the leaves in them.

`torch.utils._pytree` is what torch's own exporter and compiler use. It knows the classes that libraries register, such
as transformers' outputs, which a walk of our own wouldn't. Torch documents these functions nowhere. If one is renamed,
the import fails here.
"""

from torch.utils._pytree import tree_flatten, tree_is_leaf, tree_leaves, tree_map_only, tree_unflatten

__all__ = ["tree_flatten", "tree_is_leaf", "tree_leaves", "tree_map_only", "tree_unflatten"]
