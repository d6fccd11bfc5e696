r"""The g weight sets from the original weights: exact, and not stuck.

Expert i starts as :math:`W_i = s W + d_i` with :math:`\sum_i d_i = 0`. While all coefficients are equal, at
:math:`c`, and :math:`s = 1 / (g c)`, they mix to :math:`\sum_i c W_i = W`: the converted model computes what
the original did. The experts differ, so the predictor receives a gradient at the first step.
"""

import torch
from torch import Tensor

from dyconvert.methods import Method

# Prime, so that no filter's length divides it and two experts never repeat each other's filters.
_STRIDE = 16411
# Elements of a weight that are expanded at a time: few enough to stay in a core's cache for all g experts.
_SLICE = 262144


class Deviations:
    """A supply of :math:`d_1 ... d_g`, normal, zero in sum, and cheap.

    Drawing g normals per weight took most of a conversion's time. So a table n of period g * L is drawn once,
    and :math:`d_i[x] = (n[x + i L] - n[x + (i + 1) L]) / \\sqrt 2`: the sum over i telescopes around the period.

    Args:
        g: number of experts.
        seed: of the generator. The global one isn't touched.
    """

    def __init__(self, g: int, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self.g = g
        self.period = g * _STRIDE
        generator = torch.Generator().manual_seed(seed)
        # In double, whatever the weights are: the sum is zero only to this table's precision.
        drawn = torch.randn(self.period, generator=generator, dtype=torch.float64)
        table = ((drawn - drawn.roll(-_STRIDE)) / 2**0.5).to(device, dtype)
        # From any offset, the g-th of the longest slices still ends within the table.
        self.table = table.repeat(2 + -(-_SLICE // self.period))

    def get(self, shape: tuple[int, int], offset: int) -> Tensor:
        """d_1 ... d_g, `[g, *shape]`, for `shape` (filters, length); another offset gives other ones."""
        return self.table.as_strided((self.g, *shape), (_STRIDE, shape[1], 1), offset % self.period)


def expand(weight: Tensor, method: Method, deviations: Deviations, diversity: float, offset: int) -> Tensor:
    """The bank of a conv that starts by computing what `weight` computes.

    Args:
        weight: `[C_out, ...]`: a conv's weight, or its bias.
        method: gives g and the coefficients that a predictor starts with.
        deviations: made for the same g, dtype and device.
        diversity: the deviations' size relative to the root mean square of each output channel's weights.
        offset: one number per conv.

    Returns:
        `[g * C_out, ...]`, in the memory format of `weight`; the same dtype and device.
    """
    g = method.g
    scale = 1.0 / (g * method.initial_coefficient)
    base = weight * scale
    bank = empty_bank(weight, g)
    if g == 1:
        return bank.copy_(base)
    # Rows lie together in memory, so that every slice is written from end to end.
    rows, experts = _rows(base), _rows(bank).unflatten(0, (g, -1))
    size = magnitudes(rows) * diversity
    count = max(_SLICE // rows.shape[1], 1)
    for start in range(0, rows.shape[0], count):
        part = rows[start : start + count]
        d = deviations.get((part.shape[0], part.shape[1]), offset + start * rows.shape[1])
        torch.addcmul(part, d, size[start : start + count], out=experts[:, start : start + count])
    return bank


def _rows(weight: Tensor) -> Tensor:
    """A view `[C_out, K]` of a weight or bank, each row in the order in which it lies in memory."""
    order = sorted(range(1, weight.dim()), key=lambda dim: (-weight.stride()[dim], dim))
    return weight.permute(0, *order).flatten(1) if weight.dim() > 1 else weight.unsqueeze(1)


def empty_bank(weight: Tensor, g: int) -> Tensor:
    """An unfilled bank for a conv's weight or bias, `[g * C_out, ...]`, in its memory format."""
    # As empty_like would for the same shape: the dimensions in the order in which they lie in memory.
    order = sorted(range(weight.dim()), key=lambda dim: (-weight.stride()[dim], dim))
    if order[0] != 0 or weight.is_contiguous():
        return weight.new_empty((g * weight.shape[0], *weight.shape[1:]))
    shape = [g * weight.shape[0], *(weight.shape[dim] for dim in order[1:])]
    return weight.new_empty(shape).permute([order.index(dim) for dim in range(weight.dim())])


def magnitudes(rows: Tensor) -> Tensor:
    """Root mean square of each output channel's weights, `[C_out, K]` to `[C_out, 1]`, and never zero.

    A channel that was pruned to zeros is to learn again as well; it gets a tenth of what is typical.
    """
    length = rows.shape[1] ** 0.5
    rms = torch.linalg.vector_norm(rows, dim=1, keepdim=True) / length
    typical = rms.square().mean().sqrt()
    typical = torch.where(typical == 0, 1 / length, typical)  # not `if`: the meta device has no values
    return rms.clamp(min=0.1 * typical)
