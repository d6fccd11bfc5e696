"""What `deepcopy` of a GraphModule leaves out, and how a copy gets it: torch copies the graph and the tensors alone.

A private hook of GraphModule, `_deepcopy_hooks`, is called with each copy. Without it, copies of what
`torch.fx.symbolic_trace` returned would lose forward hooks, plain attributes and train/eval switches, as torch's do.
"""

from typing import Any

from torch import nn
from torch.fx import GraphModule

# What a GraphModule's copy makes anew.
_OF_GRAPH_MODULES = {"_graph", "_code", "_modules", "_parameters", "_buffers", "_tracer_cls", "_tracer_extras"}


def fill_graph_module(copy: GraphModule, attributes: dict[str, Any], modes: dict[str, bool]) -> None:
    """Give a GraphModule's deep copy what `deepcopy` leaves out: forward hooks, plain attributes, train/eval switches.

    Args:
        copy: the copy.
        attributes: the deep copy of the original's `__dict__`.
        modes: the original's train/eval switches, by name.
    """
    if type(copy).train is not nn.Module.train:
        copy.train(modes[""])  # torchvision's feature extractors change their graph with their mode
    for name, value in attributes.items():
        if name not in _OF_GRAPH_MODULES and (name not in vars(copy) or name == "training" or "hook" in name):
            vars(copy)[name] = value
    modules = dict(copy.named_modules())
    for name, training in modes.items():
        if name in modules:
            modules[name].training = training


def keep_when_copied(module: GraphModule) -> None:
    """Have all later deep copies of a GraphModule keep what :func:`fill_graph_module` keeps."""
    hooks = vars(module).setdefault("_deepcopy_hooks", [])
    if not any(isinstance(hook, _Filler) for hook in hooks):
        hooks.append(_Filler(vars(module), {}))


class _Filler:
    """A deepcopy hook: torch copies it along with the module, its attributes included, and calls it with the copy."""

    def __init__(self, attributes: dict[str, Any], modes: dict[str, bool]) -> None:
        self.attributes = attributes
        self.modes = modes

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Filler":
        return _Filler(memo.get(id(self.attributes), self.attributes), modes_of(self.attributes))

    def __call__(self, copy: GraphModule) -> None:
        fill_graph_module(copy, self.attributes, self.modes)
        self.attributes = vars(copy)


def modes_of(attributes: dict[str, Any]) -> dict[str, bool]:
    """The train/eval switches of a module with these attributes, and of all in it, by name."""
    modes = {"": attributes["training"]}
    for key, child in attributes["_modules"].items():
        if child is not None:
            modes |= {name: module.training for name, module in child.named_modules(prefix=key)}
    return modes
