"""Cuts a copy of the model to the chosen channels, which are selected or merged."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dyconvert.narrowing.graph import Graph, Group
from dyconvert.narrowing.layers import ChannelSlice
from dyconvert.narrowing.record import put
from dyconvert.torch_internals.modules import BatchOrInstanceNorm, parameter_table, tensor_tables

_NORMS = (nn.LayerNorm, nn.GroupNorm, BatchOrInstanceNorm)


@dataclass
class Choice:
    """The choice among a group's channels.

    Attributes:
        kept: `[k]`: the channels to keep, in order.
        representative: `[size]`: for each channel, the kept one that represents it; a kept one represents itself.
    """

    kept: Tensor
    representative: Tensor


def everything(group: Group) -> Choice:
    return Choice(torch.arange(group.size), torch.arange(group.size))


@dataclass
class Fold:
    """The mapping from the channels of one place to the kept ones.

    Attributes:
        kept: `[k]`: numbers of the kept channels, in order.
        into: `[C]`: for each of the C channels, the index of its representative in `kept`.
    """

    kept: Tensor
    into: Tensor


class Folds:
    """The folds of all places, from the choices of all groups.

    Args:
        choices: by group name; groups without one keep their channels.
    """

    def __init__(self, graph: Graph, choices: dict[str, Choice]) -> None:
        self._represents: dict[tuple[str, str], dict[int, int]] = defaultdict(dict)
        self.dims: dict[str, int] = {}
        for group in graph.groups:
            choice = choices.get(group.name)
            if choice is None or len(choice.kept) == group.size:
                continue
            for member in group.members:
                place = self._represents[member.name, member.side]
                self.dims[member.name] = member.dim
                # A flattened map has several features for one channel; each is mapped to its own counterpart.
                copies: dict[int, list[int]] = defaultdict(list)
                for channel, position in sorted(zip(member.channels.tolist(), member.positions.tolist(), strict=True)):
                    copies[position].append(channel)
                for position, channels in copies.items():
                    into = copies[int(choice.representative[position])]
                    place.update(zip(channels, into, strict=True))

    @property
    def places(self) -> list[tuple[str, str]]:
        return list(self._represents)

    def get(self, name: str, side: str, size: int) -> Fold:
        """The fold of a place that has `size` channels; the identity if all are kept."""
        place = self._represents.get((name, side), {})
        to = torch.tensor([place.get(channel, channel) for channel in range(size)])
        kept, into = to.unique(return_inverse=True)
        return Fold(kept, into)


def cut(model: nn.Module, graph: Graph, folds: Folds, *, merge: bool) -> None:
    """Make the modules of `model` narrower, in place.

    Args:
        merge: average the filters of channels that become one, and add up the weights that read them. Otherwise the
            representatives' weights are selected.
    """
    for name, side in folds.places:
        if side == "parameter":
            _cut_parameter(model, name, folds, merge)
        elif side == "padding":
            _cut_padding(model, name, graph, folds)
        else:
            module = model.get_submodule(name)
            _cut_module(module, name, side, graph.cutters[name], folds, merge)


def _cut_module(module: nn.Module, name: str, side: str, cutter: Any, folds: Folds, merge: bool) -> None:
    size = cutter.get_out_channels(module) if side == "out" else cutter.get_in_channels(module)
    fold = folds.get(name, side, size)
    dropped = sorted(set(range(size)) - set(fold.kept.tolist()))
    merged = _merged(module, side, fold) if merge else {}
    modes = {key: p.requires_grad for key, p in module.named_parameters(recurse=False)}
    with _both_affine(module, size):
        (cutter.prune_out_channels if side == "out" else cutter.prune_in_channels)(module, dropped)
    if side == "out":
        _cut_others(module, size, fold.kept)
    with torch.no_grad():
        for key, p in module.named_parameters(recurse=False):
            p.requires_grad_(modes[key])
        for key, value in merged.items():
            getattr(module, key).copy_(value)


@contextmanager
def _both_affine(module: nn.Module, size: int) -> Iterator[None]:
    """In the block, a norm with only weight or bias has the other too: torch-pruning cuts both of an affine norm."""
    missing = []
    if isinstance(module, _NORMS) and any(p is not None for p in (module.weight, module.bias)):
        missing = [key for key in ("weight", "bias") if parameter_table(module).get(key) is None]
    for key in missing:
        parameter_table(module)[key] = nn.Parameter(torch.zeros(size))
    yield
    for key in missing:
        parameter_table(module)[key] = None


def _cut_others(module: nn.Module, size: int, kept: Tensor) -> None:
    """Cut parameters and buffers of a subclass with one entry per channel, such as timm's `ScaledStdConv2d.gain`."""
    for tensors in tensor_tables(module):
        for key, old in tensors.items():
            if old is not None and old.dim() and old.shape[0] == size > len(kept) and key not in ("weight", "bias"):
                new = old.detach().index_select(0, kept.to(old.device))
                tensors[key] = nn.Parameter(new) if isinstance(old, nn.Parameter) else new


def _merged(module: nn.Module, side: str, fold: Fold) -> dict[str, Tensor]:
    """The merged parameters and buffers: outputs averaged, inputs added up."""
    tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    if side == "in":
        dim = 0 if getattr(module, "transposed", False) else 1
        per_group = tensors["weight"].shape[dim]
        # Representatives are the same in each group of a grouped conv.
        into = fold.into[:per_group] if per_group < len(fold.into) else fold.into
        return {"weight": _summed(tensors["weight"], dim, into)}
    merged = {}
    for key, t in tensors.items():
        dim = 1 if key == "weight" and getattr(module, "transposed", False) else 0
        if t.dim() > dim and t.shape[dim] == len(fold.into):
            counts = torch.bincount(fold.into).to(t)
            shape = [-1 if d == dim else 1 for d in range(t.dim())]
            merged[key] = _summed(t, dim, fold.into) / counts.view(shape)
    return merged


def _summed(t: Tensor, dim: int, into: Tensor) -> Tensor:
    shape = list(t.shape)
    shape[dim] = int(into.max()) + 1
    return t.detach().new_zeros(shape).index_add_(dim, into.to(t.device), t.detach())


def _cut_parameter(model: nn.Module, name: str, folds: Folds, merge: bool) -> None:
    parent, _, key = name.rpartition(".")
    owner = model.get_submodule(parent)
    old = parameter_table(owner)[key]
    dim = folds.dims[name] % old.dim()
    fold = folds.get(name, "parameter", old.shape[dim])
    new = old.detach().index_select(dim, fold.kept.to(old.device))
    if merge:
        shape = [-1 if d == dim else 1 for d in range(old.dim())]
        new = _summed(old, dim, fold.into) / torch.bincount(fold.into).to(old).view(shape)
    parameter_table(owner)[key] = nn.Parameter(new, old.requires_grad)


def _cut_padding(model: nn.Module, name: str, graph: Graph, folds: Folds) -> None:
    """Keep a slice of the output of a shortcut, which still pads by as many channels as before."""
    padding = graph.paddings[name]
    size = max(int(m.channels.max()) for g in graph.groups for m in g.members if (m.name, m.side) == (name, "padding"))
    kept = folds.get(name, "padding", size + 1).kept
    # The shortcut still pads with all `before` channels; the ones to keep are those adjacent to its input channels.
    start = padding.before - int((kept < padding.before).sum())
    module = model.get_submodule(name)
    put(model, name, ChannelSlice(module, start, start + len(kept)).train(module.training))
