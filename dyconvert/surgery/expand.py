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


class Deviations:
    """A supply of :math:`d_1 ... d_g`, normal, zero in sum, and cheap.

    Drawing g normals per weight took most of a conversion's time. So a table n of period g * L is drawn once,
    and :math:`d_i[x] = (n[x + i L] - n[x + (i + 1) L]) / \\sqrt 2`: the sum over i telescopes around the period.

    Args:
        g: number of experts.
        length: the longest weight that will be asked for, in elements.
        seed: of the generator. The global one isn't touched.
    """

    def __init__(self, g: int, length: int, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self.period = g * _STRIDE
        generator = torch.Generator().manual_seed(seed)
        # In double, whatever the weights are: the sum is zero only to this table's precision.
        drawn = torch.randn(self.period, generator=generator, dtype=torch.float64)
        table = ((drawn - drawn.roll(-_STRIDE)) / 2**0.5).to(device, dtype)
        self.table = table.repeat((length + 2 * self.period) // self.period + 1)

    def get(self, i: int, shape: torch.Size, offset: int) -> Tensor:
        """d_i for a weight of this shape; another `offset` gives another conv its own."""
        start = offset % self.period + i * _STRIDE
        return self.table[start : start + shape.numel()].view(shape)


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
    size = spread(base) * diversity
    for i, expert in enumerate(bank.unflatten(0, (g, -1)).unbind()):
        torch.addcmul(base, deviations.get(i, weight.shape, offset), size, out=expert)
    return bank


def empty_bank(weight: Tensor, g: int) -> Tensor:
    """An unfilled bank for a conv's weight or bias, `[g * C_out, ...]`, in its memory format."""
    # As empty_like would for the same shape: the dimensions in the order in which they lie in memory.
    order = sorted(range(weight.dim()), key=lambda dim: (-weight.stride(dim), dim))
    if order[0] != 0 or weight.is_contiguous():
        return weight.new_empty((g * weight.shape[0], *weight.shape[1:]))
    shape = [g * weight.shape[0], *(weight.shape[dim] for dim in order[1:])]
    return weight.new_empty(shape).permute([order.index(dim) for dim in range(weight.dim())])


def spread(weight: Tensor) -> Tensor:
    """Root mean square of each output channel's weights, `[C_out, 1, ...]`, and never zero.

    A channel that was pruned to zeros is to learn again as well; it gets the fraction of its neighbours' spread.
    """
    if weight.dim() == 1:
        rms = weight.abs()
    else:
        rms = torch.linalg.vector_norm(weight.flatten(1), dim=1) / weight[0].numel() ** 0.5
    typical = rms.square().mean().sqrt()
    if typical == 0:
        typical = torch.full_like(typical, weight[0].numel() ** -0.5)
    return rms.clamp(min=0.1 * typical).view(-1, *[1] * (weight.dim() - 1))
