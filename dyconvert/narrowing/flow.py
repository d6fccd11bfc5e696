"""Follows each layer's output: to the batch norm that normalises it, and the residual sum that it goes into."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dyconvert.narrowing.places import Place, Watch
from dyconvert.torch_internals.modules import BatchNorm, ConvNd


@dataclass(frozen=True)
class Aim:
    """The output that a layer's weights are solved for: its own, its batch norm's, or that of a residual sum.

    Attributes:
        place: the operator with that output: the layer itself, its batch norm, or the sum.
        norm: name of the batch norm in between; None: there is none.
        other: the operator whose output is added, if it ran before the layer; None: no sum.
        channels_first: whether the channels are dimension 1; otherwise they are the last dimension.
        clamp: the range that a ReLU or a clamp leaves, if nothing else reads the output.
        shape: the output's shape.
    """

    place: Place
    norm: str | None
    other: Place | None
    channels_first: bool
    clamp: tuple[float, float] | None = None
    shape: tuple[int, ...] = field(default=(), compare=False)

    def kind(self) -> tuple[Any, ...]:
        """The values that must be equal in the original's aim and the narrowed model's."""
        return self.norm, self.other is not None, self.clamp, self.channels_first


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a conv or a linear, whose weights are solved."""
    return isinstance(module, ConvNd | nn.Linear)


def find_aims(model: nn.Module, watch: Watch) -> dict[str, tuple[Aim, ...]]:
    """The aims of every conv and linear that a watched forward called, one for each of its calls.

    A layer that is called several times is aimed at its own output. A layer is left out if the output of a call isn't a
    batch of maps, or the watch didn't see the operator that computed it.
    """
    readers: dict[int, list[int]] = defaultdict(list)
    for number, inputs in enumerate(watch.inputs):
        for producer in inputs:
            if producer is not None:
                readers[producer].append(number)
    for number in watch.returned:
        readers[number].append(-1)  # the caller of the model
    norms = {number: place.module for number, place in enumerate(watch.places) if _is_norm(model, watch, place)}
    aims: dict[str, tuple[Aim, ...]] = {}
    for name, calls in watch.calls.items():
        module = model.get_submodule(name)
        if not is_layer(module) or not all(_is_batch(module, call) for call in calls):
            continue
        first = isinstance(module, ConvNd)
        if len(calls) == 1:
            aims[name] = (_aim(watch, readers, norms, calls[0], first),)
        else:
            aims[name] = tuple(
                Aim(watch.places[c.number], None, None, first, _clamp(watch, readers[c.number]), c.shape) for c in calls
            )
    return aims


def _is_norm(model: nn.Module, watch: Watch, place: Place) -> bool:
    """Whether an operator belongs to a batch norm that has running statistics and is called once."""
    if "batch_norm" not in place.operator or len(watch.calls.get(place.module, ())) != 1:
        return False
    module = model.get_submodule(place.module)
    return isinstance(module, BatchNorm) and module.running_mean is not None


def _is_batch(module: nn.Module, call: Any) -> bool:
    dims = len(module.kernel_size) + 2 if isinstance(module, ConvNd) else len(call.shape)
    return call.number is not None and len(call.shape) == dims >= 2


def _aim(watch: Watch, readers: dict[int, list[int]], norms: dict[int, str], call: Any, channels_first: bool) -> Aim:
    at, norm, other = call.number, None, None
    if readers[at] and readers[at][0] in norms and len(readers[at]) == 1:
        at = readers[at][0]
        norm = norms[at]
    if len(readers[at]) == 1 and (total := readers[at][0]) >= 0 and _is_sum(watch, total):
        others = [producer for producer in watch.inputs[total] if producer != at]
        # If the other summand is computed later, its layer reconstructs the sum. If the sum broadcasts, shapes differ.
        early = len(others) == 1 and others[0] is not None and others[0] < call.number
        if early and watch.shapes[total] == watch.shapes[others[0]] == call.shape:
            at, other = total, watch.places[others[0]]
    return Aim(watch.places[at], norm, other, channels_first, _clamp(watch, readers[at]), call.shape)


def _is_sum(watch: Watch, number: int) -> bool:
    named = watch.arguments[number][1]
    return watch.places[number].operator in ("add.Tensor", "add_.Tensor") and named.get("alpha", 1) == 1


def _clamp(watch: Watch, readers: list[int]) -> tuple[float, float] | None:
    """The range that the only reader leaves, if it is a ReLU, a ReLU6 or a clamp by numbers."""
    if len(readers) != 1 or readers[0] < 0:
        return None
    operator = watch.places[readers[0]].operator.partition(".")[0].removesuffix("_")
    args, named = watch.arguments[readers[0]]
    if operator == "relu":
        return 0.0, float("inf")
    bounds = [*args[1:], None, None][:2]
    if operator == "hardtanh":
        low, high = (-1.0 if bounds[0] is None else bounds[0]), (1.0 if bounds[1] is None else bounds[1])
    elif operator in ("clamp", "clamp_min", "clamp_max"):
        low, high = (None, bounds[0]) if operator == "clamp_max" else bounds
        low, high = named.get("min", low), named.get("max", high)
    else:
        return None
    low, high = (float("-inf") if low is None else low), (float("inf") if high is None else high)
    # If a bound is a tensor, the arguments don't have it.
    return None if len(watch.inputs[readers[0]]) > 1 or low > high else (float(low), float(high))
