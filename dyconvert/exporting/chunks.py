"""`chunk` and `split` along a size that varies, as slices: the graph of a list of unknown length can't be written."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class ChunksAsSlices(TorchFunctionMode):
    """While a model is traced, cuts along a symbolic size by slices: as many parts, each of as many images.

    onnxscript writes a sequence for them, and its own folding of constants fails on sequences of unknown length.

    Attributes:
        parts: into how many parts the batch is cut, at most; fewer images make fewer parts, which a graph can't.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parts = 1

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function not in (torch.chunk, Tensor.chunk, torch.split, Tensor.split):
            return result
        x, number, dim = _arguments(*args, **(kwargs or {}))
        length = x.shape[dim]
        if not isinstance(length, torch.SymInt) or isinstance(number, (list, tuple)):
            return result
        # The first part's length, as an expression of the whole.
        step = (length + number - 1) // number if function in (torch.chunk, Tensor.chunk) else number
        before = (slice(None),) * (dim % x.dim())
        last = len(result) - 1
        if dim % x.dim() == 0:
            self.parts = max(self.parts, len(result))
        # The last part has no end: one would be taken for within the length, which it is for an even one only.
        return tuple(x[(*before, slice(step * i, step * (i + 1) if i < last else None))] for i in range(last + 1))


def _arguments(x: Tensor | None = None, number: Any = None, dim: int = 0, **named: Any) -> tuple[Tensor, Any, int]:
    """The tensor, the sizes or the number of its parts, and the dimension; each function has its own names for them."""
    x = named.get("input", named.get("tensor", x))
    number = named.get("chunks", named.get("split_size_or_sections", named.get("split_size", number)))
    return x, number, dim
