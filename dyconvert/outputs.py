"""The tensors in what a model returns, whatever it returns them in."""

import types
from collections import UserDict, UserList
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dyconvert.torch_internals.trees import tree_is_leaf, tree_leaves

# Types that hold no outputs: for example, a returned module's parameters aren't outputs.
_OPAQUE = (str, bytes, type, nn.Module, torch.Generator, types.ModuleType, types.FunctionType, types.MethodType)
# A generator may have no end.
_MOST_ITEMS = 10_000


def tensors_in(returned: Any, numbers: bool = True) -> list[tuple[str, Tensor]]:
    """Every tensor that can be reached in what a model returned, with the path to it.

    Goes into lists, tuples, named tuples, sets, mappings, dataclasses, registered pytrees, iterators (and uses those
    up), and the attributes and slots of any other object, as detectors' structures.

    Args:
        returned: anything.
        numbers: NumPy's arrays and Python's floats count as tensors, too.

    Returns:
        Pairs such as `("['boxes'][0]", tensor)` and `(".logits", tensor)`; the path is `""` if a tensor is all that
        was returned.
    """
    return list(_walk(returned, "", {}, numbers))


def _walk(value: Any, path: str, seen: dict[int, Any], numbers: bool) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield from _parts_of_tensor(value, path)
    elif isinstance(value, (np.ndarray, np.generic)):
        if numbers and (np.issubdtype(value.dtype, np.number) or value.dtype == bool):
            yield path, torch.as_tensor(np.array(value))
    elif isinstance(value, (float, complex)):
        if numbers:
            yield path, torch.tensor(value, dtype=torch.complex128 if isinstance(value, complex) else torch.float64)
    elif not isinstance(value, _OPAQUE) and id(value) not in seen:
        seen[id(value)] = value  # kept, so that no other object gets its id
        for key, child in _children(value):
            yield from _walk(child, path + key, seen, numbers)


def _parts_of_tensor(tensor: Tensor, path: str) -> Iterator[tuple[str, Tensor]]:
    if tensor.is_nested:
        yield from ((f"{path}[{i}]", part) for i, part in enumerate(tensor.unbind()))
    elif tensor.is_quantized:
        yield path, tensor.dequantize()
    elif tensor.layout is not torch.strided:
        yield path, tensor.to_dense()
    else:
        yield path, tensor


def _children(value: Any) -> Iterable[tuple[str, Any]]:
    """The direct items of a container or an object, with the step that leads to each."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [(f".{name}", getattr(value, name)) for name in value._fields]
    inner: list[tuple[str, Any]] = []
    if isinstance(value, Mapping):
        inner = [(f"[{key!r}]", value[key]) for key in value]
    elif isinstance(value, Iterator):
        inner = [(f"[{i}]", each) for i, each in enumerate(islice(value, _MOST_ITEMS))]
    elif isinstance(value, Sequence | Set):
        inner = [(f"[{i}]", each) for i, each in enumerate(value)]
    elif is_dataclass(value):
        inner = [
            (f".{field.name}", getattr(value, field.name)) for field in fields(value) if hasattr(value, field.name)
        ]
    elif not tree_is_leaf(value):
        leaves = tree_leaves(value, is_leaf=lambda each: each is not value)
        inner = [(f"[{i}]", each) for i, each in enumerate(leaves)]
    # A ModelOutput has its fields as attributes, too; a UserDict its dict.
    known = {id(each) for _, each in inner}
    if isinstance(value, UserDict | UserList):
        known.add(id(value.data))
    return inner + [(key, each) for key, each in _attributes(value) if id(each) not in known]


def _attributes(value: Any) -> list[tuple[str, Any]]:
    """An object's attributes and slots; of numbers only tensors, for a plain number may be an option of the object."""
    attributes = dict(getattr(value, "__dict__", {}))
    for base in type(value).__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if not name.startswith("__") and hasattr(value, name):
                attributes.setdefault(name, getattr(value, name))
    return [(f".{name}", each) for name, each in attributes.items() if not isinstance(each, float | complex)]
