"""Numbers of channels to keep: one width for all groups, or widths by sensitivity for a budget of multiply-adds."""

from collections import defaultdict

from torch import Tensor

from dyconvert.errors import ModelError
from dyconvert.narrowing.choose import unexplained
from dyconvert.narrowing.graph import Graph, Group

# The smallest share of its channels that a group keeps.
_LEAST = 1 / 8
# A step of the search narrows a group by at least this share of its channels, so that large groups don't take long.
_STEP = 1 / 32


def multiple(size: int, round_to: int) -> int:
    """A group of `size` channels is rounded to a multiple of this: `round_to`, or less if the group is small."""
    while round_to > 1 and round_to * 8 > size:
        round_to //= 2
    return round_to


def rounded(group: Group, channels: float, round_to: int) -> int:
    """The number of a group's units, at least one, with about this many channels, rounded to a multiple."""
    step = multiple(group.size, round_to)
    whole = max(step, int(channels / step + 0.5) * step)
    return min(max(1, round(whole * group.units / group.size)), group.units)


def by_width(graph: Graph, width: float, round_to: int) -> dict[str, int]:
    """Units to keep, by group name: the same share of each."""
    return {group.name: rounded(group, width * group.size, round_to) for group in graph.free}


class Cost:
    """Multiply-adds of a model's layers, as a function of how many units its groups keep."""

    def __init__(self, graph: Graph) -> None:
        self._layers = {name: layer.positions * layer.weights for name, layer in graph.layers.items()}
        # For each layer: (group, side, channels there). The weight of a depthwise conv has one such side.
        self._sides: dict[str, list[tuple[str, str, int]]] = defaultdict(list)
        self._sizes = {group.name: group.size for group in graph.groups}
        self._units = {group.name: group.units for group in graph.groups}
        self._whole: dict[tuple[str, str], int] = defaultdict(int)
        self.touched: dict[str, set[str]] = defaultdict(set)
        for group in graph.groups:
            for member in group.members:
                if member.name in self._layers and member.side in ("out", "in"):
                    self._sides[member.name].append((group.name, member.side, len(member.channels)))
                    self._whole[member.name, member.side] += len(member.channels)
                    self.touched[group.name].add(member.name)

    @property
    def whole(self) -> int:
        return sum(self._layers.values())

    def layer(self, name: str, units: dict[str, int]) -> float:
        shares = {"out": 0.0, "in": 0.0}
        for group, side, channels in self._sides[name]:
            shares[side] += channels * units.get(group, self._units[group]) / self._units[group]
        cost = float(self._layers[name])
        for side, remaining in shares.items():
            if whole := self._whole.get((name, side)):
                cost *= remaining / whole
        return cost

    def total(self, units: dict[str, int]) -> float:
        return sum(self.layer(name, units) for name in self._layers)


def by_flops(
    graph: Graph, share: float, similarity: dict[str, Tensor], round_to: int, reserve: float = 0.0
) -> dict[str, int]:
    """Units to keep, by group name, so that the multiply-adds are at most `share` of the original's.

    The search starts with all channels. Each step narrows the group that loses least for each multiply-add that it
    saves. A group's loss is the share of its layers' variance that its remaining directions don't explain.

    Args:
        similarity: by group name, `[units, units]`, as :func:`~dyconvert.narrowing.choose.choose` takes it.
        reserve: the share of multiply-adds that mixing kernels and predicting coefficients will take.

    Raises:
        ModelError: the target is below what can be reached.
    """
    cost = Cost(graph)
    units = {group.name: group.units for group in graph.free}
    least = {group.name: rounded(group, _LEAST * group.size, round_to) for group in graph.free}
    lowest = cost.total(least) / cost.whole + reserve
    if share < lowest:
        raise ModelError(
            f"A share of {share:g} of the multiply-adds can't be reached: at the narrowest, {lowest:.3f} are left. "
            f"Ask for {lowest:.3f} to 1, keep less, or give a width."
        )
    lost = {group.name: _lost(group, similarity[group.name], graph) for group in graph.free}
    groups = {group.name: group for group in graph.free}
    now = cost.total(units)
    rates: dict[str, tuple[float, int, float]] = {}
    while now > (share - reserve) * cost.whole:
        for name, group in groups.items():
            if name in rates:
                continue
            fewer = _narrower(group, units[name], least[name], round_to)
            if fewer is None:
                rates[name] = (float("inf"), 0, 0.0)
                continue
            before = sum(cost.layer(layer, units) for layer in cost.touched[name])
            saved = before - sum(cost.layer(layer, units | {name: fewer}) for layer in cost.touched[name])
            loss = lost[name][fewer - 1] - lost[name][units[name] - 1]
            rates[name] = (max(loss, 1e-9) / max(saved, 1e-9), fewer, saved)
        best = min(rates, key=lambda name: rates[name][0])
        _, units[best], saved = rates[best]
        now -= saved
        # Groups that share a layer with it save less now.
        for name in groups:
            if cost.touched[name] & cost.touched[best]:
                rates.pop(name, None)
    return units


def _narrower(group: Group, units: int, least: int, round_to: int) -> int | None:
    """The next smaller number of units, or None if there is none."""
    per_unit = group.size / group.units
    step = max(multiple(group.size, round_to), int(_STEP * group.size))
    fewer = rounded(group, units * per_unit - step, round_to)
    fewer = min(fewer, units - 1)
    return fewer if fewer >= least else (least if least < units else None)


def _lost(group: Group, similarity: Tensor, graph: Graph) -> list[float]:
    """The loss with k = 1, 2, ... units, summed over the group's layers."""
    layers = sum(member.name in graph.layers for member in group.makers)
    return (unexplained(similarity) * layers).tolist()
