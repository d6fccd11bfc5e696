"""The likeliest classes of images."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dyconvert.errors import ModelError, brief
from dyconvert.transforms import Preprocessing


class Classified(NamedTuple):
    """A class of an image: the output's number, its name, and its probability."""

    index: int  # type: ignore[assignment]  # a tuple's own `index` isn't needed here
    name: str
    probability: float


@torch.inference_mode()
def classified(
    model: nn.Module, prepare: Preprocessing, images: Sequence[Any | str | os.PathLike[str]], top: int = 5
) -> list[list[Classified]]:
    """The `top` likeliest classes of each image, the likeliest first.

    Args:
        model: a classifier, which returns logits `[N, classes]`; it is run in eval mode, and left as it is.
        images: PIL images, or files.

    Raises:
        ModelError: the model rejects the images, or returns something else.
        DyconvertError: a file can't be read.
    """
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    batch = prepare.batch(images)
    if first is not None:
        batch = batch.to(first.device, first.dtype)
    was_training = model.training
    try:
        logits = model.eval()(batch)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} rejects images of {'x'.join(map(str, batch.shape[1:]))}: {brief(error)}. Give the "
            "size that it takes: `example=...`."
        ) from error
    finally:
        model.train(was_training)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        what = f"{list(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise ModelError(
            f"{type(model).__name__} returns {what}, and classes are read from logits [images, classes]. Call the "
            "loaded model yourself."
        )
    likeliest = logits.float().softmax(1).topk(min(top, logits.shape[1]))
    return [
        [Classified(i, prepare.class_name(i), p) for i, p in zip(indices, values, strict=True)]
        for indices, values in zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    ]
