"""Channels that have to be narrowed together, and the layers that have them.

A group is a set of channels that are the same channels in several layers: those of a conv, of its batch norm and of
the convs that read them; of all layers that add to one residual stream; of a depthwise conv on both sides.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from dyconvert.errors import ModelError, some
from dyconvert.narrowing.obstacles import Padding


@dataclass
class Member:
    """A group's channels in one place.

    Attributes:
        name: of the module, or of the parameter that belongs to none.
        side: "out": the module's outputs (and inputs, where they are the same channels: batch norm, depthwise
            conv); "in": its inputs; "parameter": a parameter of its own, along `dim`; "padding": what a shortcut
            that pads channels returns.
        channels: `[m]`, numbers of the channels there.
        positions: `[m]`, which of the group's channels each of them is.
    """

    name: str
    side: str
    channels: Tensor
    positions: Tensor
    dim: int = 0

    def order(self, size: int) -> Tensor | None:
        """`[size]`: its channels in the order of the group's; None where it hasn't just one for each of them."""
        if len(self.positions) != size or len(self.positions.unique()) != size:
            return None
        return self.channels[self.positions.argsort()]


@dataclass
class Group:
    """Channels that are narrowed together.

    Attributes:
        name: the first module that makes them.
        size: how many there are.
        members: where they are.
        unit: `[size]`: which unit each channel is of. A unit is kept or dropped as a whole: one channel as a rule;
            before and behind a grouped conv, the channels of the same place in each of its groups.
        kept: why they are all kept, or None.
    """

    name: str
    size: int
    members: list[Member]
    unit: Tensor
    kept: str | None = None

    @property
    def units(self) -> int:
        return int(self.unit.max()) + 1

    @property
    def makers(self) -> list[Member]:
        return [member for member in self.members if member.side == "out"]


@dataclass
class Layer:
    """A conv or linear, as it was seen in a trial run.

    Attributes:
        positions: output pixels of one image, of all its calls.
        weights: elements of its weight; times `positions`, its multiply-adds.
    """

    name: str
    positions: int
    weights: int
    depthwise: bool = False


@dataclass
class Graph:
    """The coupled groups of a model, and its layers in the order in which data flows."""

    groups: list[Group]
    layers: dict[str, Layer]
    paddings: dict[str, Padding]
    cutters: dict[str, Any] = field(repr=False)

    @property
    def free(self) -> list[Group]:
        return [group for group in self.groups if group.kept is None]


def check_free(model: nn.Module, graph: Graph) -> None:
    """Refuse a model in which nothing can be narrowed.

    Raises:
        ModelError: it says why.
    """
    if not graph.free:
        reasons = sorted({f"{group.kept}" for group in graph.groups})
        raise ModelError(f"No channels of {type(model).__name__} can be narrowed: {some(reasons)}.")


def keep_unsteady(graph: Graph, names: set[str]) -> None:
    """Keep the channels that layers read or make whose calls can't be recognised from one run to the next."""
    for group in graph.free:
        if unsteady := sorted({member.name for member in group.members} & names):
            group.kept = f"{unsteady[0]} is called otherwise from one run to the next"
