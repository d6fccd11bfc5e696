"""Does the converted model compute what the original does?"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from dyconvert.arguments import as_arguments
from dyconvert.errors import ModelError


@dataclass(frozen=True)
class Difference:
    """How far one output tensor is from the original's.

    Attributes:
        output: where the tensor stands in what the model returns; "" if it is all that is returned.
        absolute: the largest absolute difference.
        relative: that, over the original's largest absolute value.
    """

    output: str
    absolute: float
    relative: float


@dataclass(frozen=True)
class Differences:
    """The differences of all output tensors; `absolute` and `relative` are the largest."""

    outputs: tuple[Difference, ...]

    @property
    def absolute(self) -> float:
        return max((d.absolute for d in self.outputs), default=0.0)

    @property
    def relative(self) -> float:
        return max((d.relative for d in self.outputs), default=0.0)

    def __str__(self) -> str:
        return f"largest difference {self.relative:.1e} relative, {self.absolute:.1e} absolute"


def verify(model: nn.Module, dynamic: nn.Module, example: Any) -> Differences:
    """Run both models in eval mode on `example` and compare every tensor that they return.

    Args:
        model: the original.
        dynamic: what it was converted to.
        example: an input tensor, or the tuple of the forward's arguments, on the models' device.

    Raises:
        ModelError: a model rejects the example, or the two return different things.
    """
    first, second = (_outputs(m, copy.deepcopy(example)) for m in (model, dynamic))
    if [(path, t.shape) for path, t in first] != [(path, t.shape) for path, t in second]:
        raise ModelError(
            f"The models return different things: {_shapes(first)} and {_shapes(second)}. "
            "Was `dynamic` converted from `model`?"
        )
    return Differences(tuple(_compare(path, a, b) for (path, a), (_, b) in zip(first, second, strict=True)))


def _outputs(model: nn.Module, example: Any) -> list[tuple[str, Tensor]]:
    arguments = as_arguments(example)
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            returned = model.eval()(*arguments)
    except Exception as error:
        raise ModelError(f"{type(model).__name__} rejects the example: {type(error).__name__}: {error}") from error
    finally:
        for module, training in modes:
            module.training = training
    leaves = tree_flatten_with_path(returned)[0]
    return [(keystr(path), leaf) for path, leaf in leaves if isinstance(leaf, Tensor)]


def _shapes(outputs: list[tuple[str, Tensor]]) -> str:
    return ", ".join(f"output{path} {list(t.shape)}" for path, t in outputs) or "no tensors"


def _compare(path: str, original: Tensor, dynamic: Tensor) -> Difference:
    a, b = (t.detach().double() if not t.is_complex() else t.detach() for t in (original, dynamic))
    if a.numel() == 0:
        return Difference(path, 0.0, 0.0)
    # Where both overflow alike there is no difference; a NaN on one side only is an infinite one.
    apart = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs()).nan_to_num(nan=float("inf"))
    absolute = apart.max().item()
    size = a[a.isfinite()].abs().max().item() if a.isfinite().any() else 0.0
    return Difference(path, absolute, absolute / size if size else absolute)
