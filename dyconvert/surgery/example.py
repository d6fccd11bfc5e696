"""Random images that a model takes."""

import math
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dyconvert.errors import ModelError
from dyconvert.limits import INPUT_VALUES
from dyconvert.surgery.guesses import convs_of
from dyconvert.surgery.observe import observe
from dyconvert.torch_internals.trees import tree_map_only


def example_for(
    model: nn.Module, batch: int = 2, size: tuple[int, ...] | None = None, seed: int = 0
) -> tuple[Any, ...]:
    """Random images that the model takes, on its device: the arguments of its forward.

    Args:
        batch: images in a batch; a model that takes a list of images gets one.
        size: `(C, *spatial)`, or `(*spatial,)` alone. None: the first of the common sizes that the model takes.

    Raises:
        ModelError: it takes none of them, or not this size.
    """
    first = next(model.parameters())
    if size is not None:
        first_conv = next(convs_of(model), None)
        if first_conv is not None and len(size) == len(first_conv.kernel_size):
            size = (first_conv.in_channels, *size)
        arguments = observe(model, set(), torch.empty(1, *size, device="meta", dtype=first.dtype)).example
    elif (observed := observe(model, set())) is not None:
        arguments = observed.example
    else:
        raise ModelError(
            f"{type(model).__name__} takes none of the common input sizes. Give an input of its size: `example=...`."
        )
    return random_images(arguments, first.device, batch, seed)


Arguments = TypeVar("Arguments", tuple[Any, ...], dict[str, Any])


def random_images(arguments: Arguments, device: torch.device, batch: int, seed: int = 0) -> Arguments:
    """Arguments on the meta device, by position or by keyword, as random ones, with `batch` images in each that is a
    tensor by itself."""
    if isinstance(arguments, dict):
        return dict(zip(arguments, random_images(tuple(arguments.values()), device, batch, seed), strict=True))
    generator = torch.Generator("cpu").manual_seed(seed)

    def image(t: Tensor, alone: bool) -> Tensor:
        shape = (batch, *t.shape[1:]) if alone else t.shape
        if math.prod(shape) > INPUT_VALUES:
            raise ModelError(
                f"An input of {'x'.join(map(str, shape))} has more than {INPUT_VALUES:,} values. Take fewer images at "
                "a time, or smaller ones: `example=...`."
            )
        return torch.randn(shape, generator=generator, device="cpu").to(device, t.dtype)

    return tuple(
        image(value, True) if isinstance(value, Tensor) else tree_map_only(Tensor, lambda t: image(t, False), value)
        for value in arguments
    )
