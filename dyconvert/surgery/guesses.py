"""Inputs that a model may take, guessed by its first conv."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from dyconvert.nn import DynamicConv
from dyconvert.torch_internals.modules import ConvNd

# Spatial sizes that models are commonly built for, by the number of spatial dimensions.
_COMMON_SIZES: dict[int, list[tuple[int, ...]]] = {
    1: [(224,), (1024,), (16000,)],
    2: [(s, s) for s in (224, 299, 256, 384, 512, 128, 64, 32, 28, 16, 8)],
    3: [(16, 112, 112), (16, 224, 224), (32, 224, 224), (8, 56, 56), (16, 32, 32)],
}


def convs_of(model: nn.Module) -> Iterator[nn.Module]:
    # A converted model's first conv may be dynamic itself.
    return (m for m in model.modules() if isinstance(m, (ConvNd, DynamicConv)))


def guesses(model: nn.Module) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Calls, with inputs on the meta device, that a model with this first conv may take."""
    first = next(convs_of(model), None)
    if first is None:
        return
    dims = len(first.kernel_size)
    # timm's models tell the size of their input.
    config: Any = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    known = config.get("input_size") if isinstance(config, dict) else None
    shapes = [(first.in_channels, *size) for size in _COMMON_SIZES[dims]]
    if known is not None and len(known) == dims + 1:
        shapes.insert(0, tuple(known))
    required = [p for p in inspect.signature(model.forward).parameters.values() if p.default is p.empty]
    positional = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in required)
    keywords = [p.name for p in required if p.kind is p.KEYWORD_ONLY]
    for shape in shapes:
        image = torch.empty(1, *shape, device="meta", dtype=first.weight.dtype)
        yield (image,) * (positional if keywords else max(positional, 1)), dict.fromkeys(keywords, image)
    for shape in shapes[:2]:
        yield ([torch.empty(shape, device="meta", dtype=first.weight.dtype)],), {}
