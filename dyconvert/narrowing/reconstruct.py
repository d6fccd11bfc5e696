"""Weights that reproduce the original's outputs from the narrowed model's inputs, layer by layer.

A pass through the narrowed model, with all calibration images at once: each layer is solved when the data gets to it,
so it reads what the layers before it, already solved, make. It is aimed at the original's output at the kept channels:
behind its batch norm, and with what a residual sum adds taken away as the narrowed model has it, so that a layer makes
up for the errors of those before. A layer that is called several times, as a head over a pyramid's levels, is solved
when all its calls have been seen; what comes behind it waits for the next pass.
"""

import math
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dyconvert.narrowing.calibrate import Samples, first_look
from dyconvert.narrowing.cut import Folds
from dyconvert.narrowing.flow import Aim, find_aims
from dyconvert.narrowing.images import Images
from dyconvert.narrowing.obstacles import shared_weights
from dyconvert.narrowing.patches import as_rows, as_weight, patches
from dyconvert.narrowing.places import Place, watched
from dyconvert.narrowing.positions import Positions, held_out
from dyconvert.narrowing.record import SolvedLayer
from dyconvert.narrowing.solve import RIDGE, Rows, Solution, solve
from dyconvert.surgery.adapters import is_standardised, unsupported
from dyconvert.torch_internals.modules import BatchNorm, tensor_tables
from dyconvert.torch_internals.watching import without_modes

SOLVED, MERGED = "least-squares", "merge"
Progress = Callable[[int, int], None]


def reconstruct(
    model: nn.Module,
    images: Images,
    samples: Samples,
    folds: Folds,
    positions: Positions,
    progress: Progress,
    *,
    ridge: float = RIDGE,
) -> list[SolvedLayer]:
    """Solve the weights of a narrowed model, in place.

    Args:
        model: as :func:`~dyconvert.narrowing.cut.cut` leaves it, merged; in eval mode and without hooks.
        images: the calibration images, of which the last ones are held out.
        samples: what the original's layers return on these.
        positions: where they were sampled.

    Returns:
        For each layer, in the order in which data flows, where its weights come from, and its error.
    """
    merged = [(t, t.detach().clone()) for t in (*model.parameters(), *model.buffers())]
    aims = first_look(model, images)
    for attempt in range(3):
        work = _Work(model, images, aims, samples, folds, positions, progress, ridge)
        seen = work.passes()
        changed = {name for name in work.planned if seen.get(name) != aims[name]}
        if not changed:
            break
        # Other operators ran for all images than for a few: the solved weights may be of the wrong ones.
        with torch.no_grad():
            for t, value in merged:
                t.copy_(value)
        aims = {name: calls for name, calls in seen.items() if attempt == 0 or name not in changed}
    return work.layers()


def why_not_solved(model: nn.Module, name: str, shared: set[int]) -> str | None:
    """Why a layer's weights can't be solved for, or None."""
    layer = model.get_submodule(name)
    if isinstance(layer, nn.Linear):
        if type(layer).forward is not nn.Linear.forward:
            return f"{type(layer).__name__} has a forward of its own"
    elif (reason := unsupported(layer)) is not None:
        return reason
    elif is_standardised(layer):
        return "it standardises its weight at each call"
    if not isinstance(layer.weight, nn.Parameter) or not layer.weight.is_floating_point():
        return "its weight is no plain parameter of real numbers"
    return "its weight is shared with another layer" if id(layer.weight) in shared else None


class _Work:
    """The layers of a narrowed model that are solved, and those that are solved already."""

    def __init__(
        self,
        model: nn.Module,
        images: Images,
        aims: dict[str, tuple[Aim, ...]],
        samples: Samples,
        folds: Folds,
        positions: Positions,
        progress: Progress,
        ridge: float,
    ) -> None:
        self.model, self.images, self.aims, self.samples = model, images, aims, samples
        self.folds, self.positions, self.progress, self.ridge = folds, positions, progress, ridge
        self.found: dict[str, SolvedLayer] = {}
        shared = shared_weights(model)
        self.planned = []
        for name in aims:
            if (why := why_not_solved(model, name, shared) or self._unlike(name)) is None:
                self.planned.append(name)
            else:
                self.found[name] = SolvedLayer(name=name, weights=MERGED, why=why)
        self.users = Counter(aims[name][0].other for name in self.planned)
        self.others: dict[Place, Tensor] = {}
        self.norms: set[str] = set()
        self.restated: set[str] = set()
        self.waiting: str | None = None
        self.parts: list[Rows] = []

    def _unlike(self, name: str) -> str | None:
        """Why what the original computes there isn't what the narrowed model is to compute."""
        theirs = self.samples.aims.get(name)
        if theirs is None:
            return "its calls can't be recognised from one run to the next"
        if [aim.kind() for aim in theirs] != [aim.kind() for aim in self.aims[name]]:
            return "its output goes elsewhere in the narrowed model"
        return None

    def layers(self) -> list[SolvedLayer]:
        return [self.found[name] for name in self.aims if name in self.found]

    def passes(self) -> dict[str, tuple[Aim, ...]]:
        """Solve all that is planned; returns the aims that the last pass saw."""
        while True:
            solved = len(self.found)
            aims = self._pass()
            if self.waiting is not None:
                self._solve(self.waiting, self.parts)
                self.waiting, self.parts = None, []
            elif len(self.found) == solved or all(name in self.found for name in self.planned):
                return aims

    def _pass(self) -> dict[str, tuple[Aim, ...]]:
        wanted: dict[Place, list[Callable[[Tensor], None]]] = {}
        for name in self.planned:
            other = self.aims[name][0].other
            if name not in self.found and other is not None and other not in wanted:
                wanted[other] = [partial(self.others.__setitem__, other)]
        handles = []
        for name, module in self.model.named_modules():
            if name in self.planned and name not in self.found:
                handles.append(module.register_forward_pre_hook(self._reached(name), with_kwargs=True))
            elif isinstance(module, BatchNorm):
                handles.append(module.register_forward_pre_hook(self._restating(name)))
        try:
            return find_aims(self.model, watched(self.model, self.images.part(0, len(self.images)), wanted))
        finally:
            self.others.clear()
            for handle in handles:
                handle.remove()

    def _restating(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if self.waiting is None and name not in self.norms | self.restated:
                self.restated.add(name)
                with without_modes():
                    _restate(module, args[0])

        return hook

    def _reached(self, name: str) -> Callable[..., None]:
        calls = self.aims[name]
        numbers = iter(range(len(calls)))

        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            number = next(numbers, None)
            if number is None or name in self.found or self.waiting not in (None, name):
                return
            with without_modes():
                rows = self._rows(name, layer, number, args[0] if args else kwargs["input"])
                if len(calls) > 1:
                    self.waiting = name
                    self.parts.append(rows)
                else:
                    self._solve(name, [rows])

        return hook

    def _rows(self, name: str, layer: nn.Module, number: int, x: Tensor) -> Rows | None:
        """What a call reads and is to return; None where it isn't the call that the original had."""
        aim, count = self.aims[name][number], len(self.aims[name])
        theirs = self.samples.rows[name]
        z = theirs[number] if number < len(theirs) else x.new_zeros(0, 1)
        z = z[:, self.folds.get(name, "out", z.shape[1]).kept.to(z.device)]
        shape = (len(x), z.shape[1], *aim.shape[2:]) if aim.channels_first else (*x.shape[:-1], z.shape[1])
        total = math.prod(shape) // z.shape[1]
        if len(self.positions.of(total, count)) != len(z):
            return None
        added = None
        if aim.other is not None:
            other = self.others.get(aim.other)
            if other is None or other.shape != shape:
                return None
            added = _real(self.positions.take(other, aim.channels_first))
            self.users[aim.other] -= 1
            if not self.users[aim.other]:
                del self.others[aim.other]
        read = _real(patches(layer, x, self.positions, shape, count))
        targets = _real(z) if added is None else _real(z) - added
        fitted = self.positions.fitted(total, count)
        if count == len(self.images) and len(x) == 1:  # a loop over the images
            fitted = len(z) if number < count - held_out(count) else 0
        return Rows(read, targets, added, fitted, aim.clamp)

    def _solve(self, name: str, parts: list[Rows | None]) -> None:
        layer = self.model.get_submodule(name)
        norm_name = self.aims[name][0].norm
        norm = self.model.get_submodule(norm_name) if norm_name else None
        if any(part is None for part in parts):
            solved = SolvedLayer(name=name, weights=MERGED, why="it reads or returns other maps than in the original")
        else:
            solved = _fit(name, layer, norm, _joined(parts), self.ridge)
        if solved.weights == SOLVED and norm_name:
            self.norms.add(norm_name)
        self.found[name] = solved
        self.progress(len(self.found), len(self.aims))


def _real(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _joined(parts: list[Rows]) -> Rows:
    """The rows of several calls as one: those that are solved on, and then those that are held out."""
    if len(parts) == 1:
        return parts[0]

    def cat(tensors: list[Tensor]) -> Tensor:
        whole = [t[: part.fitted] for t, part in zip(tensors, parts, strict=True)]
        return torch.cat([*whole, *(t[part.fitted :] for t, part in zip(tensors, parts, strict=True))])

    clamps = {part.clamp for part in parts}
    return Rows(
        cat([part.x for part in parts]),
        cat([part.z for part in parts]),
        None,
        sum(part.fitted for part in parts),
        clamps.pop() if len(clamps) == 1 else None,
    )


@torch.no_grad()
def _fit(name: str, layer: nn.Module, norm: nn.Module | None, rows: Rows, ridge: float) -> SolvedLayer:
    """Give a layer, and the batch norm behind it, weights that make `z` of `x`, where these beat the merged ones."""
    if rows.fitted < 2:
        return SolvedLayer(name=name, weights=MERGED, why="too few images to solve it")
    if not (rows.x.isfinite().all() and rows.z.isfinite().all()):
        return SolvedLayer(name=name, weights=MERGED, why="it reads or returns values that aren't finite")
    groups = rows.x.shape[1]
    now = as_rows(layer, layer.weight.detach().double())  # [C, F]
    if (rows.x.shape[2], rows.z.shape[1]) != (now.shape[1], now.shape[0]):
        return SolvedLayer(name=name, weights=MERGED, why="it is called with other channels than its weights are for")
    merged = rows.error(_made_now(layer, norm, now, rows))
    factor = _factor(norm) if norm is not None else now.new_ones(len(now))
    prior = (now * factor.unsqueeze(1)).unflatten(0, (groups, -1)).transpose(1, 2)  # [g, F, C]
    center = norm is not None or layer.bias is not None
    try:
        solution = solve(rows, [prior, torch.zeros_like(prior)], center=center, ridge=ridge)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return SolvedLayer(name=name, weights=MERGED, error=merged, why="its inputs can't be solved for")
    if merged is not None and not solution.error < merged:
        return SolvedLayer(name=name, weights=MERGED, error=merged, why="merging is better")
    changed = [layer, *([norm] if norm is not None else [])]
    tensors = [t for module in changed for table in tensor_tables(module) for t in table.values() if t is not None]
    before = [(t, t.clone()) for t in tensors]
    _write(layer, norm, solution, factor)
    if all(t.isfinite().all() for t, _ in before):
        return SolvedLayer(name=name, weights=SOLVED, error=solution.error)
    for t, value in before:
        t.copy_(value)
    return SolvedLayer(name=name, weights=MERGED, error=merged, why="its solution is out of its dtype's range")


def _made_now(layer: nn.Module, norm: nn.Module | None, now: Tensor, rows: Rows) -> Tensor:
    """The outputs of the layer, and the batch norm behind it, with their present weights."""
    x = rows.x  # [P, g, F]
    weight = now.to(x.dtype).unflatten(0, (x.shape[1], -1)).transpose(1, 2)  # [g, F, C]
    outputs = (x.transpose(0, 1) @ weight).transpose(0, 1).flatten(1)
    if layer.bias is not None:
        outputs = outputs + layer.bias.to(x.dtype)
    if norm is None:
        return outputs
    scale = (norm.running_var.double() + norm.eps).rsqrt().to(x.dtype)
    outputs = (outputs - norm.running_mean.to(x.dtype)) * scale
    if norm.weight is not None:
        outputs = outputs * norm.weight.to(x.dtype)
    return outputs if norm.bias is None else outputs + norm.bias.to(x.dtype)


def _write(layer: nn.Module, norm: nn.Module | None, solution: Solution, factor: Tensor) -> None:
    effective = solution.weight.transpose(1, 2).flatten(0, 1)  # [C, F]
    mean = (solution.weight.transpose(1, 2) @ solution.mean_in.unsqueeze(2)).flatten()
    if norm is None:
        layer.weight.copy_(as_weight(layer, effective))
        if layer.bias is not None:
            layer.bias.copy_(solution.mean_out - mean)
        return
    # In the scale that the layer had, with the statistics and the affine map to match: in training mode, whose
    # statistics are the batch's, the batch norm computes nearly the same.
    layer.weight.copy_(as_weight(layer, effective / factor.unsqueeze(1)))
    if layer.bias is not None:
        layer.bias.zero_()
    if norm.weight is not None and norm.bias is not None:
        variance = solution.variance / factor.square()
        norm.running_mean.copy_(mean / factor)
        norm.running_var.copy_(variance)
        norm.weight.copy_((variance + norm.eps).sqrt() * factor)
        norm.bias.copy_(solution.mean_out)
        return
    if norm.weight is not None:
        norm.weight.copy_((norm.running_var.double() + norm.eps).sqrt() * factor)
    if norm.bias is not None:
        norm.bias.copy_(solution.mean_out)
    else:
        mean = mean - solution.mean_out
    norm.running_mean.copy_(mean / factor)


def _factor(norm: nn.Module) -> Tensor:
    """What a batch norm multiplies each channel by, `[C]`; never near zero."""
    gain = torch.ones_like(norm.running_var, dtype=torch.float64)
    if norm.weight is not None:
        gain = norm.weight.detach().double()
    factor = gain / (norm.running_var.double() + norm.eps).sqrt()
    typical = factor.abs().mean().clamp(min=1e-6)
    return torch.where(factor.abs() < 1e-3 * typical, typical, factor)


@torch.no_grad()
def _restate(norm: nn.Module, x: Tensor) -> None:
    """Re-estimate a batch norm's statistics on its new input, without changing what it computes."""
    if norm.weight is None or norm.bias is None or norm.running_mean is None or x.numel() <= x.shape[1]:
        return
    dims = [d for d in range(x.dim()) if d != 1]
    variance, mean = torch.var_mean(_real(x), dims, correction=0)
    if not (variance.isfinite().all() and mean.isfinite().all()):
        return
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    norm.bias.add_(scale * (mean - norm.running_mean))
    norm.weight.copy_(scale * (variance + norm.eps).sqrt())
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
