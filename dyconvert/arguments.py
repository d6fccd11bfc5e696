"""An example, as users give it, as the arguments of a model's forward."""

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map_only


def as_arguments(example: Any) -> tuple[Any, ...]:
    """The positional arguments of a forward: a tuple is these already, anything else is the only one."""
    return example if isinstance(example, tuple) else (example,)


def first_image(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arguments for a batch of one: tensors `[N, ...]` as `[1, ...]`, all else as it is."""
    return tuple(value[:1] if isinstance(value, Tensor) and value.dim() else value for value in arguments)


def on_device(arguments: tuple[Any, ...], device: Any) -> tuple[Any, ...]:
    """The same arguments with every tensor in them on `device`."""
    return tree_map_only(Tensor, lambda t: t.to(device), arguments)
