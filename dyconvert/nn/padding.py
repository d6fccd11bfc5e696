"""How much a conv pads by: torch's "same" and "valid" in numbers; TensorFlow's "same", which depends on the input."""

from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor

# In place of "same" as a dynamic conv's padding.
TF_SAME = "tf_same"


def pad_tf_same(x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """Zeros around x, so that a conv's output has `ceil(size / stride)` pixels; the odd one at the end.

    Args:
        x: `[N, C, *spatial]`
    """
    amounts: list[int] = []
    for size, kernel, step, rate in zip(x.shape[2:], kernel_size, stride, dilation, strict=True):
        outputs = (size + step - 1) // step
        total = max((outputs - 1) * step + (kernel - 1) * rate + 1 - size, 0)
        amounts = [total // 2, total - total // 2, *amounts]  # F.pad takes the last dimension first
    return F.pad(x, amounts)


def amounts_of_padding(kernel_size: Sequence[int], padding: Sequence[int] | str, dilation: Sequence[int]) -> list[int]:
    """The argument of `F.pad` for a conv's padding: (before, after) of the last dimension first.

    All zero for :data:`TF_SAME`, whose amounts :func:`pad_tf_same` takes from the input.
    """
    amounts: list[int] = []
    for dim in reversed(range(len(kernel_size))):
        if padding == "same":
            total = dilation[dim] * (kernel_size[dim] - 1)
            amounts += [total // 2, total - total // 2]
        elif padding in ("valid", TF_SAME):
            amounts += [0, 0]
        else:
            amounts += [cast(Sequence[int], padding)[dim]] * 2
    return amounts
