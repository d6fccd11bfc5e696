"""The error of a narrowed model's outputs against the original's."""

import torch
from torch import Tensor, nn

from dyconvert.narrowing.images import Images
from dyconvert.narrowing.positions import held_out
from dyconvert.outputs import tensors_in


@torch.no_grad()
def output_error(original: nn.Module, narrowed: nn.Module, images: Images) -> float | None:
    """The error of the narrowed model's outputs on the held-out images.

    The mean squared difference, over the variance from image to image, as a mean over the output's tensors. 1 is the
    error of each output's mean. None if it can't be measured: too few images, or outputs of other shapes.

    Args:
        original, narrowed: in eval mode.
    """
    count = held_out(len(images))
    if not count:
        return None
    first = len(images) - count
    original_outputs, narrowed_outputs = (
        [t for _, t in tensors_in(model(*images.part(first, len(images)))) if t.is_floating_point() and t.numel()]
        for model in (original, narrowed)
    )
    if [t.shape for t in original_outputs] != [t.shape for t in narrowed_outputs]:
        return None
    errors = [
        e
        for a, b in zip(original_outputs, narrowed_outputs, strict=True)
        if (e := _error(a.double(), b.double(), count)) is not None
    ]
    return sum(errors) / len(errors) if errors else None


def _error(original: Tensor, narrowed: Tensor, count: int) -> float | None:
    if not original.isfinite().all():
        return None
    by_image = count > 1 and original.dim() > 1 and len(original) == count
    mean = original.mean(0) if by_image else original.mean()
    variance = (original - mean).square().mean()
    if variance <= 1e-12 * original.square().mean():
        return None
    return ((original - narrowed).square().mean() / variance).nan_to_num(float("inf"), float("inf")).item()
