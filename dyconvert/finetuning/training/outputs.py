"""Takes a network's logits out of any form of output, and the features that its head reads."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def outputs_of(output: Any) -> Iterator[Tensor]:
    """The logits, then those of auxiliary heads: of a tensor, a dict (segmentation) or a tuple (GoogLeNet)."""
    if isinstance(output, Tensor):
        yield output
        return
    if hasattr(output, "logits") and not isinstance(output, tuple):
        yield output.logits
        return
    values = output.values() if isinstance(output, dict) else output
    yield from (value for value in values if isinstance(value, Tensor))


@contextmanager
def reading(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Yields a list. In the block, each call of `layer` replaces the list's content by its input, as `[N, F]`."""
    read: list[Tensor] = []

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        read[:] = [inputs[0].flatten(1)]

    handle = layer.register_forward_pre_hook(hook)
    try:
        yield read
    finally:
        handle.remove()
