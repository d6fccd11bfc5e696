"""An example, as users give it, as the arguments of a model's forward."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from dyconvert.errors import ModelError
from dyconvert.torch_internals.trees import tree_map_only


def check_module(model: Any, name: str = "model") -> None:
    """Refuse a value that isn't a module.

    Raises:
        ModelError: it is none.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name} has to be a torch.nn.Module, not a {type(model).__name__}. Pass the model itself.")


def check_iterable(data: Any) -> None:
    """Refuse what holds no batches.

    Raises:
        ModelError: it can't be gone through.
    """
    if not isinstance(data, Iterable):
        raise ModelError(
            f"The data has to be a DataLoader or another iterable of batches, not a {type(data).__name__}. "
            "Give a list of batches: `data=[...]`."
        )


def as_arguments(example: Any) -> tuple[Any, ...]:
    """The positional arguments of a forward: a tuple is these already, anything else is the only one."""
    return example if isinstance(example, tuple) else (example,)


def as_call(model: nn.Module, example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and the keyword arguments that an example stands for.

    A dict whose keys are all parameters of the model's forward is keyword arguments; another dict is the only argument.
    """
    if isinstance(example, Mapping) and example:
        parameters = inspect.signature(model.forward).parameters.values()
        named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if all(isinstance(key, str) and key in named for key in example):
            return (), dict(example)
    return as_arguments(example), {}


def in_dtype(model: nn.Module, values: Any) -> Any:
    """`values` with floating-point tensors in the model's dtype, where all its parameters have one and the same."""
    dtypes = {p.dtype for p in model.parameters()}
    if len(dtypes) != 1 or not (dtype := dtypes.pop()).is_floating_point:
        return values
    return map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, values)


def first_image(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arguments for a batch of one: tensors `[N, ...]` as `[1, ...]`, all else as it is."""
    return tuple(value[:1] if isinstance(value, Tensor) and value.dim() else value for value in arguments)


def map_tensors(change: Any, value: Any) -> Any:
    """`value` with `change(t)` in the place of every tensor t in its lists, tuples and dicts."""
    return tree_map_only(Tensor, change, value)
