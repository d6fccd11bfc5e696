"""Ridge regression towards a prior, its strength chosen on rows that aren't used to solve.

Minimises ``|x W - z|^2 / P + ridge * mean(var x) * |W - prior|^2`` over the rows of the images that are solved on, for
each group of a grouped conv (Hoerl and Kennard 1970); the factorisation is in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# The ridge relative to the inputs' mean variance: enough against noise, and far below the signal. If held-out rows
# favour it, it is multiplied or divided by ten, several times; at the largest, the weights are nearly the prior.
RIDGE = 1e-2
_STEP = 10.0
_WEAKEST, _STRONGEST = 1e-5, 1e3
# Iterations for outputs that an activation cuts off.
_ROUNDS = 10


@dataclass
class Rows:
    """A layer's inputs and the outputs that it is to return, at the sampled rows of its calls.

    Attributes:
        x: `[P, groups, F]`: the inputs of the narrowed layer, which its weights are multiplied with.
        z: `[P, C_out]`: the outputs of the original.
        added: `[P, C_out]`: the other summand, if a sum follows before the activation; None: no sum.
        fitted: rows before this one are solved on; the others are held out.
        clamp: the range that the activation leaves; None: no activation.
    """

    x: Tensor
    z: Tensor
    added: Tensor | None
    fitted: int
    clamp: tuple[float, float] | None

    def error(self, outputs: Tensor) -> float | None:
        """Mean squared error of `outputs` `[P, C_out]` on held-out rows, over the variance; None without rows.

        Errors are measured behind the activation. 1 is the error of each channel's mean.
        """
        held_out = len(self.z) - self.fitted
        if held_out < 2:
            return None
        targets, outputs = self.z[self.fitted :], outputs[self.fitted :]
        if self.added is not None:
            targets, outputs = targets + self.added[self.fitted :], outputs + self.added[self.fitted :]
        if self.clamp is not None:
            targets, outputs = targets.clamp(*self.clamp), outputs.clamp(*self.clamp)
        variance = targets.double().var(0, correction=0).mean().clamp(min=1e-30)
        return ((targets.double() - outputs.double()).square().mean() / variance).item()


@dataclass
class Solution:
    """A layer's weights as :func:`solve` finds them.

    Attributes:
        weight: `[groups, F, C_out / groups]`: maps inputs minus mean_in to outputs minus mean_out.
        mean_in: `[groups, F]`.
        mean_out: `[C_out]`.
        variance: `[C_out]`: variance of the outputs with these weights.
        error: the value of :meth:`Rows.error`.
        ridge: the chosen strength.
    """

    weight: Tensor
    mean_in: Tensor
    mean_out: Tensor
    variance: Tensor
    error: float | None
    ridge: float


class _Normal:
    """The normal equations of a layer's rows."""

    def __init__(self, rows: Rows, center: bool) -> None:
        x, z, fit = rows.x, rows.z, slice(rows.fitted)
        groups = x.shape[1]
        self.rows = rows
        self.center = center
        self.mean_in = x[fit].mean(0) if center else x.new_zeros(x.shape[1:])
        self.mean_out = z[fit].mean(0) if center else z.new_zeros(z.shape[1:])
        self.centred = (x - self.mean_in).transpose(0, 1)  # [g, P, F]
        self.gram = self._product(self.centred[:, fit])
        self.scale = self.gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12).view(-1, 1, 1)
        self.groups = groups
        self.cross = self.cross_with(z, self.mean_out)
        self.eye = torch.eye(self.gram.shape[-1], dtype=self.gram.dtype, device=self.gram.device)

    def _product(self, right: Tensor) -> Tensor:
        fitted = self.centred[:, : self.rows.fitted]
        return (fitted.mT @ right).double() / self.rows.fitted

    def cross_with(self, z: Tensor, mean: Tensor) -> Tensor:
        fit = slice(self.rows.fitted)
        return self._product((z[fit] - mean).unflatten(1, (self.groups, -1)).transpose(0, 1))

    def factor(self, ridge: float) -> Tensor:
        return torch.linalg.cholesky(self.gram + ridge * self.scale * self.eye)

    def outputs(self, weight: Tensor, mean: Tensor) -> Tensor:
        """`[P, C_out]`: the outputs with these weights."""
        return (self.centred @ weight.to(self.centred.dtype)).transpose(0, 1).flatten(1) + mean


def solve(rows: Rows, priors: list[Tensor], *, center: bool, ridge: float = RIDGE) -> Solution:
    """Solve for the weights, with the prior and the ridge that held-out rows favour.

    Args:
        priors: `[groups, F, C_out / groups]` each: the weights where the images don't determine them. Without held-out
            rows, the first prior is used.
        center: whether a bias takes the means.
        ridge: the start of the search; without held-out rows, the ridge itself.

    Raises:
        torch.linalg.LinAlgError: the rows aren't finite.
    """
    normal = _Normal(rows, center)

    def at(strength: float) -> tuple[float, Tensor, Tensor, float]:
        factor = normal.factor(strength)
        pull = strength * normal.scale
        tried = []
        for prior in priors if rows.fitted < len(rows.z) else priors[:1]:
            weight = torch.cholesky_solve(normal.cross + pull * prior, factor)
            error = rows.error(normal.outputs(weight, normal.mean_out))
            tried.append((float("nan") if error is None else error, weight, prior))
        error, weight, prior = min(tried, key=lambda entry: entry[0])
        return error, weight, prior, strength

    best = _search(at, ridge)
    error, weight, prior, strength = best
    mean_out = normal.mean_out
    error = None if error != error else error
    if rows.clamp is not None:
        clamped, mean = _behind_the_clamp(normal, weight, strength, prior)
        after = rows.error(normal.outputs(clamped, mean))
        if after is None or after <= error:
            weight, mean_out, error = clamped, mean, after
    variance = torch.einsum("gfc,gfe,gec->gc", weight, normal.gram, weight).flatten()
    return Solution(weight, normal.mean_in.double(), mean_out.double(), variance, error, strength)


def _search(
    at: Callable[[float], tuple[float, Tensor, Tensor, float]], ridge: float
) -> tuple[float, Tensor, Tensor, float]:
    """Search for the ridge of the least error, in steps up or down. Without errors, the ridge stays."""
    best = at(ridge)
    for factor in (_STEP, 1 / _STEP):
        moved = False
        while best[3] * factor * 1.01 >= _WEAKEST and best[3] * factor <= _STRONGEST * 1.01:
            other = at(best[3] * factor)
            if not other[0] < best[0]:
                break
            best, moved = other, True
        if moved:
            break
    return best


def _behind_the_clamp(normal: _Normal, weight: Tensor, ridge: float, prior: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and means that are fitted behind an activation: an output that it cuts off must only stay cut off."""
    rows = normal.rows
    low, high = rows.clamp
    base = 0 if rows.added is None else rows.added
    whole = rows.z + base
    below, above = whole <= low, whole >= high
    factor, pull = normal.factor(ridge), ridge * normal.scale
    mean = normal.mean_out
    for _ in range(_ROUNDS):
        outputs = normal.outputs(weight, mean) + base
        moved = torch.where(below, outputs.clamp(max=low), torch.where(above, outputs.clamp(min=high), whole)) - base
        mean = moved[: rows.fitted].mean(0) if normal.center else mean
        weight = torch.cholesky_solve(normal.cross_with(moved, mean) + pull * prior, factor)
    return weight, mean
