"""Chooses the channels to keep: how many of each group, by a width or a budget of multiply-adds, and which."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dyconvert.analysis.flops import macs
from dyconvert.arguments import first_image
from dyconvert.copying import copied, on_meta
from dyconvert.errors import ModelError, brief
from dyconvert.narrowing import choose
from dyconvert.narrowing.budget import by_flops, by_width
from dyconvert.narrowing.calibrate import Samples, map_similarity
from dyconvert.narrowing.checks import bare, check_runs
from dyconvert.narrowing.cut import Choice, Folds, cut
from dyconvert.narrowing.graph import Graph, Group

# Mixing costs one multiply-add per expert weight, and operators outside of layers, such as attention's, cost some too.
# Both are known only when the widths are, so the budget is met by iteration, at most this often.
_ATTEMPTS = 8


@dataclass
class Chosen:
    """The chosen channels.

    Attributes:
        choices: by group.
        missed: the share of multiply-adds, if it is larger than requested; None: the budget is met.
    """

    choices: dict[str, Choice]
    missed: float | None = None


class Chooser:
    """Chooses among the channels of a model's groups.

    Args:
        samples: outputs of the model's layers on calibration images; None: filters are compared instead.
        init: with "l1", the largest filters are kept.
    """

    def __init__(self, model: nn.Module, graph: Graph, samples: Samples | None, init: str, round_to: int) -> None:
        self._model, self._graph, self._init, self._round_to = model, graph, init, round_to
        self._similarity = {group.name: self._similarity_of(group, samples) for group in graph.free}

    def _similarity_of(self, group: Group, samples: Samples | None) -> Tensor:
        similarity = map_similarity(samples, self._graph, group) if samples is not None else None
        return choose.filter_similarity(self._model, self._graph, group) if similarity is None else similarity

    def by_width(self, width: float) -> Chosen:
        """The same share of each group."""
        return Chosen(self._pick(by_width(self._graph, width, self._round_to)))

    def by_flops(
        self, share: float, example: tuple[Any, ...], dynamic: Callable[[nn.Module], nn.Module] | None
    ) -> Chosen:
        """Keep a share of the multiply-adds, and take channels away where they are missed least.

        Args:
            dynamic: converts a model on the meta device; None: the model stays static.
        """
        one = first_image(example)
        whole = max(macs(self._model, one), 1)
        best, reserve = None, 0.0
        for _ in range(_ATTEMPTS):
            try:
                counts = by_flops(self._graph, share, self._similarity, self._round_to, reserve)
            except ModelError:
                if best is None:
                    raise
                break
            choices = self._pick(counts)
            total = self._macs(choices, one, dynamic or (lambda model: model)) / whole
            if total <= share:
                return Chosen(choices)
            if best is None or total < best.missed:
                best = Chosen(choices, total)
            reserve += total - share + 1e-3
        return best

    def _macs(self, choices: dict[str, Choice], one: tuple[Any, ...], dynamic: Callable[[nn.Module], nn.Module]) -> int:
        """Multiply-adds with these channels. They are counted on the meta device if the model runs there."""
        try:
            return macs(dynamic(self._trial(on_meta(self._model), choices)), one)
        except ModelError:
            raise
        except Exception:
            trial = self._trial(copied(self._model), choices)
            check_runs(bare(self._model), trial, one)
            return macs(dynamic(trial), one)

    def _trial(self, trial: nn.Module, choices: dict[str, Choice]) -> nn.Module:
        cut_channels(trial, self._graph, Folds(self._graph, choices), merge=False)
        return trial

    def _pick(self, counts: dict[str, int]) -> dict[str, Choice]:
        return {group.name: self._choose(group, counts[group.name]) for group in self._graph.free}

    def _choose(self, group: Group, count: int) -> Choice:
        if self._init == "l1":
            return choose.strongest(choose.filter_strength(self._model, self._graph, group), count, group)
        return choose.choose(self._similarity[group.name], count, group)


def cut_channels(model: nn.Module, graph: Graph, folds: Folds, *, merge: bool) -> None:
    """Make the modules of `model` narrower, in place; see :func:`~dyconvert.narrowing.cut.cut`.

    Raises:
        ModelError: a module can't be cut.
    """
    try:
        cut(model, graph, folds, merge=merge)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} can't be narrowed: {brief(error)}. Keep the channels of the module it is about: "
            "`keep=[...]`."
        ) from error
