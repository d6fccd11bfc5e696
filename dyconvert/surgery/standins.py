"""Which convs the model's code tells from other modules: shown by running the model with stand-ins.

A stand-in is a conv in all but its class, and is a new object, with a child as a dynamic conv has one. Where the
model's code asks `isinstance(layer, nn.Conv2d)`, looks for modules without children, calls a method of the conv's own
class, or holds a conv in a plain list, dict or attribute as well, it calls other modules or functions than before.
"""

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dyconvert.nn.counterparts import DYNAMIC_OF
from dyconvert.randomness import random_state, set_random_state
from dyconvert.surgery.apply import replace_everywhere
from dyconvert.surgery.observe import Observation, trial_copy
from dyconvert.surgery.recording import Call, FunctionsCalled, recording, shapes

ASKED = "the model's code tells it from other modules, or holds it elsewhere too (isinstance, a list, a dict)"


class _StandIn(nn.Module):
    """Has a conv's attributes and computes the same, but isn't of its class."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._static_class.forward(self, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # What the class's forward calls, as `_conv_forward`; of torch's, for a dynamic conv has no others.
            of_torch = next(cls for cls in self.__dict__["_static_class"].__mro__ if cls in DYNAMIC_OF)
            method = getattr(of_torch, name, None)
            if not callable(method):
                raise
            return method.__get__(self)


class _Child(nn.Module):
    """In the place of a predictor."""

    def __init__(self, like: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(like.detach().flatten()[:1].clone())


def _stand_in(conv: nn.Module) -> _StandIn:
    new = _StandIn.__new__(_StandIn)
    # It has tables of its own, so that a hook on it isn't one on the conv.
    vars(new).update({key: copy.copy(value) if isinstance(value, dict) else value for key, value in vars(conv).items()})
    vars(new)["_static_class"] = type(conv)
    new.coefficient_predictor = _Child(conv.weight)
    return new


def told_apart(model: nn.Module, convs: Sequence[str], observed: Observation) -> set[str]:
    """The `convs` to leave alone: with stand-ins for all others, the model runs as it does with its convs."""
    trial = _Trial(model, observed)
    apart: set[str] = set()
    # A model that runs otherwise each time, by draws of its own, can't be compared: at the end none is left.
    while convs_left := [name for name in convs if name not in apart]:
        calls = trial.calls(convs_left)
        if trial.is_as_observed(calls):
            break
        own = {name for name in convs_left if calls is None or calls[0].get(name) != trial.reference[0].get(name)}
        # If the convs' own calls don't show which conv it is, each is tried by itself.
        culprits = (
            own if calls is not None and own else {n for n in convs_left if not trial.is_as_observed(trial.calls([n]))}
        )
        apart |= culprits or set(convs_left)
    return apart


class _Trial:
    """Runs a copy of the model with stand-ins for some convs, and compares the calls."""

    def __init__(self, model: nn.Module, observed: Observation) -> None:
        self.model = model
        self.observed = observed
        self.watched = set(observed.calls)
        # Every run draws what the observed one drew.
        self.state = random_state()
        self.reference = self._form(observed.calls), observed.outputs, observed.functions

    def calls(self, convs: Sequence[str]) -> tuple[dict[str, Any], list[Any], list[Any]] | None:
        """The calls with stand-ins for `convs`, the outputs' shapes and the functions; None if the model fails."""
        observed = self.observed
        runner = trial_copy(self.model, observed.real, observed.hooked)
        runner = replace_everywhere(runner, {c: _stand_in(c) for c in map(runner.get_submodule, convs)})
        args, kwargs = observed.placed(runner)
        set_random_state(self.state)
        try:
            with torch.no_grad(), recording(runner, self.watched) as (calls, _), FunctionsCalled() as functions_called:
                returned = runner(*args, **kwargs)
        except Exception:  # a list that doesn't hold what it held, say
            return None
        return self._form(calls), shapes(returned), functions_called.functions

    def is_as_observed(self, calls: Any) -> bool:
        """Whether a run with stand-ins did what the observed one did."""
        if calls is None or calls[:2] != self.reference[:2]:
            return False
        return calls[2] == self.reference[2] or not self._repeats

    @functools.cached_property
    def _repeats(self) -> bool:
        """Whether two runs call the same functions at all: a model may give them the time of day."""
        again = self.calls([])
        return again is not None and again[2] == self.reference[2]

    @staticmethod
    def _form(calls: dict[str, list[Call]]) -> dict[str, Any]:
        return {
            name: [(shapes(call.args), shapes(call.kwargs), sorted(call.kwargs), call.within) for call in each]
            for name, each in calls.items()
        }
