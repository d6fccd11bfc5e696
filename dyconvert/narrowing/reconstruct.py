"""Solves the narrowed model's weights layer by layer, so that they reproduce the original's outputs.

All calibration images pass through the narrowed model at once. A layer is solved when the data reaches it, so its
inputs come from layers that are solved already. Its targets are the original's outputs at the kept channels, behind its
batch norm; if a residual sum follows, minus the other summand as the narrowed model computes it. So a layer makes up
for the errors of those before. A layer that is called several times, such as a head over a pyramid's levels, is solved
when all its calls have been seen; layers behind it wait for the next pass.
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
from dyconvert.narrowing.fit import MERGED, SOLVED, fit_layer, real_rows, restate
from dyconvert.narrowing.flow import Aim, find_aims
from dyconvert.narrowing.images import Images
from dyconvert.narrowing.obstacles import shared_weights
from dyconvert.narrowing.patches import patches
from dyconvert.narrowing.places import Place, watched
from dyconvert.narrowing.positions import Positions, held_out
from dyconvert.narrowing.record import SolvedLayer
from dyconvert.narrowing.solve import RIDGE, Rows
from dyconvert.surgery.adapters import is_standardised, unsupported
from dyconvert.torch_internals.modules import BatchNorm
from dyconvert.torch_internals.watching import without_modes

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
        model: the narrowed model with merged weights, from :func:`~dyconvert.narrowing.cut.cut`; in eval mode and
            without hooks.
        images: the calibration images, of which the last ones are held out.
        samples: the outputs of the original's layers on these images.
        positions: the positions of the samples.

    Returns:
        The origin and the error of each layer's weights, in the order in which data flows.
    """
    merged = [(t, t.detach().clone()) for t in (*model.parameters(), *model.buffers())]
    aims = first_look(model, images)
    for attempt in range(3):
        work = _Reconstruction(model, images, aims, samples, folds, positions, progress, ridge)
        seen = work.passes()
        changed = {name for name in work.planned if seen.get(name) != aims[name]}
        if not changed:
            break
        # Other operators ran for all images than for a few, so the solved weights may belong to the wrong ones.
        with torch.no_grad():
            for t, value in merged:
                t.copy_(value)
        aims = {name: calls for name, calls in seen.items() if attempt == 0 or name not in changed}
    return work.layers()


def why_not_solved(model: nn.Module, name: str, shared: set[int]) -> str | None:
    """Why a layer's weights can't be solved for; None if they can."""
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


class _Reconstruction:
    """The state of a reconstruction: the layers that are planned, and the results so far."""

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
        self.results: dict[str, SolvedLayer] = {}
        shared = shared_weights(model)
        self.planned = []
        for name in aims:
            if (why := why_not_solved(model, name, shared) or self._why_unlike(name)) is None:
                self.planned.append(name)
            else:
                self.results[name] = SolvedLayer(name=name, weights=MERGED, why=why)
        self.users = Counter(aims[name][0].other for name in self.planned)
        self.others: dict[Place, Tensor] = {}
        self.norms: set[str] = set()
        self.restated: set[str] = set()
        self.waiting: str | None = None
        self.call_rows: list[Rows] = []

    def _why_unlike(self, name: str) -> str | None:
        """Why a layer's output in the original can't be its target in the narrowed model; None if it can."""
        theirs = self.samples.aims.get(name)
        if theirs is None:
            return "its calls can't be recognised from one run to the next"
        if [aim.kind() for aim in theirs] != [aim.kind() for aim in self.aims[name]]:
            return "its output goes elsewhere in the narrowed model"
        return None

    def layers(self) -> list[SolvedLayer]:
        return [self.results[name] for name in self.aims if name in self.results]

    def passes(self) -> dict[str, tuple[Aim, ...]]:
        """Solve all planned layers; returns the aims that the last pass saw."""
        while True:
            solved = len(self.results)
            aims = self._pass()
            if self.waiting is not None:
                self._solve(self.waiting, self.call_rows)
                self.waiting, self.call_rows = None, []
            elif len(self.results) == solved or all(name in self.results for name in self.planned):
                return aims

    def _pass(self) -> dict[str, tuple[Aim, ...]]:
        listeners: dict[Place, list[Callable[[Tensor], None]]] = {}
        for name in self.planned:
            other = self.aims[name][0].other
            if name not in self.results and other is not None and other not in listeners:
                listeners[other] = [partial(self.others.__setitem__, other)]
        handles = []
        for name, module in self.model.named_modules():
            if name in self.planned and name not in self.results:
                handles.append(module.register_forward_pre_hook(self._solving_hook(name), with_kwargs=True))
            elif isinstance(module, BatchNorm):
                handles.append(module.register_forward_pre_hook(self._restating_hook(name)))
        try:
            return find_aims(self.model, watched(self.model, self.images.part(0, len(self.images)), listeners))
        finally:
            self.others.clear()
            for handle in handles:
                handle.remove()

    def _restating_hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if self.waiting is None and name not in self.norms | self.restated:
                self.restated.add(name)
                with without_modes():
                    restate(module, args[0])

        return hook

    def _solving_hook(self, name: str) -> Callable[..., None]:
        calls = self.aims[name]
        numbers = iter(range(len(calls)))

        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            number = next(numbers, None)
            if number is None or name in self.results or self.waiting not in (None, name):
                return
            with without_modes():
                rows = self._rows(name, layer, number, args[0] if args else kwargs["input"])
                if len(calls) > 1:
                    self.waiting = name
                    self.call_rows.append(rows)
                else:
                    self._solve(name, [rows])

        return hook

    def _rows(self, name: str, layer: nn.Module, number: int, x: Tensor) -> Rows | None:
        """The inputs and targets of a call; None if the original had another call there."""
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
            added = real_rows(self.positions.take(other, aim.channels_first))
            self.users[aim.other] -= 1
            if not self.users[aim.other]:
                del self.others[aim.other]
        read = real_rows(patches(layer, x, self.positions, shape, count))
        targets = real_rows(z) if added is None else real_rows(z) - added
        fitted = self.positions.fitted(total, count)
        if count == len(self.images) and len(x) == 1:  # a loop over the images
            fitted = len(z) if number < count - held_out(count) else 0
        return Rows(read, targets, added, fitted, aim.clamp)

    def _solve(self, name: str, rows_of_calls: list[Rows | None]) -> None:
        layer = self.model.get_submodule(name)
        norm_name = self.aims[name][0].norm
        norm = self.model.get_submodule(norm_name) if norm_name else None
        if any(rows is None for rows in rows_of_calls):
            solved = SolvedLayer(name=name, weights=MERGED, why="it reads or returns other maps than in the original")
        else:
            solved = fit_layer(name, layer, norm, _joined(rows_of_calls), self.ridge)
        if solved.weights == SOLVED and norm_name:
            self.norms.add(norm_name)
        self.results[name] = solved
        self.progress(len(self.results), len(self.aims))


def _joined(rows_of_calls: list[Rows]) -> Rows:
    """The rows of several calls as one: first the rows that are solved on, then the held-out ones."""
    if len(rows_of_calls) == 1:
        return rows_of_calls[0]

    def cat(tensors: list[Tensor]) -> Tensor:
        fitted = [t[: rows.fitted] for t, rows in zip(tensors, rows_of_calls, strict=True)]
        return torch.cat([*fitted, *(t[rows.fitted :] for t, rows in zip(tensors, rows_of_calls, strict=True))])

    clamps = {rows.clamp for rows in rows_of_calls}
    return Rows(
        cat([rows.x for rows in rows_of_calls]),
        cat([rows.z for rows in rows_of_calls]),
        None,
        sum(rows.fitted for rows in rows_of_calls),
        clamps.pop() if len(clamps) == 1 else None,
    )
