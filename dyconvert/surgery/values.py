"""A call with values, for trial runs: the user's example, or noise of the shapes that an observed run had."""

from typing import Any

import torch
from torch import nn

from dyconvert.arguments import as_call, in_dtype, map_tensors
from dyconvert.nn.handing import maps_in
from dyconvert.surgery.example import random_images
from dyconvert.surgery.observe import Observation


def call_with_values(
    model: nn.Module, observed: Observation, example: Any, device: torch.device, batch: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, by position and by keyword, on `device` and in the model's dtype.

    Args:
        example: as users give it; None, or one on the meta device: noise is made, of `batch` images.
    """
    if example is not None:
        values = as_call(model, example)
        if not any(t.is_meta for t in maps_in(values)):
            return map_tensors(lambda t: t.detach().to(device).clone(), in_dtype(model, values))
    return random_images(observed.args, device, batch), random_images(observed.kwargs, device, batch)
