"""Narrowing: a record of the changes, from which the narrowed architecture is made out of the original one."""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from dyconvert.errors import PlanError
from dyconvert.marks import mark_narrowing
from dyconvert.narrowing.layers import ChannelSlice
from dyconvert.torch_internals.modules import buffer_table, child_table, parameter_table, tensor_tables


class NarrowingWarning(UserWarning):
    """Narrowing didn't reach the request, or its result is far from the original."""


class NarrowedGroup(BaseModel):
    """Channels that are narrowed together.

    Attributes:
        name: the first module that computes them.
        before, after: their numbers.
        kept: why all of them were kept; None if they were narrowed.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    before: int
    after: int
    kept: str | None = None


class NarrowedModule(BaseModel):
    """The changes of one module.

    Attributes:
        name: its name in the model, as for `model.get_submodule(name)`.
        shapes: the new shapes of its own parameters and buffers.
        attributes: the new values of its own numbers, such as `out_channels`.
        channels: the channels (start, stop) that are kept of its output, if its padding can't be narrowed.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    shapes: dict[str, list[int]] = {}
    attributes: dict[str, int | list[int]] = {}
    channels: tuple[int, int] | None = None


class SolvedLayer(BaseModel):
    """The origin of a layer's weights, and their error.

    Attributes:
        name: its name in the model.
        weights: "least-squares", or "merge" if that is better, or if they can't be solved for.
        error: mean squared error of its output on held-out images, over the output's variance, behind its batch norm,
            residual sum and ReLU; None: not known.
        why: why its weights are merged.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    weights: str
    error: float | None = None
    why: str | None = None


class Narrowing(BaseModel):
    """A record of narrowing. `print(narrowing)` shows it; `model.dyconvert_narrowing` holds it.

    Attributes:
        model: the class of the original.
        width, flops: the requested share of channels, or of multiply-adds.
        init: the origin of the weights: "least-squares", "merge" or "l1".
        macs: the remaining share of the original's multiply-adds, before a conversion.
        images: number of calibration images, including those that were held out.
        held_out: number of images that weren't used to solve; the errors are measured on them.
        error: mean squared error of the model's outputs on held-out images, over their variance from image to image;
            None: not known.
        merged_error: the same error with all weights merged.
        warnings: requests that weren't met, and large errors.
        groups: the coupled channels, in the order in which data flows.
        layers: the layers that least squares solved or tried, in that order.
        modules: the modules that changed.
    """

    model_config = ConfigDict(extra="forbid")

    # 1 has no macs, images, errors, warnings and layers.
    schema_version: Literal[1, 2] = 2
    model: str
    width: float | None = None
    flops: float | None = None
    init: str
    macs: float | None = None
    images: int | None = None
    held_out: int | None = None
    error: float | None = None
    merged_error: float | None = None
    warnings: list[str] = []
    groups: list[NarrowedGroup] = []
    layers: list[SolvedLayer] = []
    modules: list[NarrowedModule]

    def __str__(self) -> str:
        lines = [f"{self.model}, init {self.init}", *(f"  {line}" for line in self.summary_lines())]
        for group in self.groups:
            reason = f"  ({group.kept})" if group.kept else ""
            lines.append(f"  {group.name}: {group.before} -> {group.after}{reason}")
        if self.layers:
            lines.append("  error of each layer on held-out images:")
        for layer in self.layers:
            error = "not known" if layer.error is None else f"{layer.error:.3f}"
            lines.append(f"    {layer.name}: {error}{f'  (merged: {layer.why})' if layer.why else ''}")
        return "\n".join(lines)

    __repr__ = __str__

    def summary_lines(self) -> list[str]:
        """The record in short: multiply-adds, the outputs' error, warnings."""
        lines = []
        if self.macs is not None:
            lines.append(f"{self.macs:.1%} of the multiply-adds")
        if self.error is not None:
            merged = "" if self.merged_error is None else f"; {self.merged_error:.3g} by merging alone"
            lines.append(f"the outputs' error on {self.held_out} held-out images: {self.error:.3g}{merged}")
        return [*lines, *(f"warning: {warning}" for warning in self.warnings)]


def changes(original: nn.Module, narrowed: nn.Module) -> list[NarrowedModule]:
    """The modules whose shapes differ between a model and a narrowed copy of it."""
    changed = []
    for name, old in original.named_modules():
        new = narrowed.get_submodule(name)
        channels = None
        if isinstance(new, ChannelSlice) and not isinstance(old, ChannelSlice):
            channels, new = (new.start, new.stop), new.module
        tensors = dict(_own_tensors(new))
        entry = NarrowedModule(
            name=name,
            shapes={n: list(tensors[n].shape) for n, t in _own_tensors(old) if tensors[n].shape != t.shape},
            attributes={n: _plain(getattr(new, n)) for n, v in _numbers(old) if getattr(new, n) != v},
            channels=channels,
        )
        if entry.shapes or entry.attributes or entry.channels:
            changed.append(entry)
    return changed


def rebuild_narrowed(model: nn.Module, narrowing: Narrowing) -> nn.Module:
    """Give the original architecture, in place, the narrowed one's shapes. Its values are loaded afterwards.

    Raises:
        PlanError: the model isn't the one that was narrowed.
    """
    # A tensor with several names stays one tensor.
    replaced: dict[int, torch.Tensor] = {}
    for entry in narrowing.modules:
        try:
            module = model.get_submodule(entry.name)
            tensors, numbers = dict(_own_tensors(module)), dict(_numbers(module))
            for name, shape in entry.shapes.items():
                _replace(module, name, tensors[name], shape, replaced)
            for name, value in entry.attributes.items():
                like: Any = numbers[name]
                new: Any = value
                setattr(module, name, type(like)(new) if isinstance(like, tuple | list) else int(new))
        except (AttributeError, KeyError, TypeError, ValueError):
            raise PlanError(
                f"{entry.name or 'the model'} was narrowed, and {type(model).__name__} isn't like it there"
            ) from None
        if entry.channels is not None:
            put(model, entry.name, ChannelSlice(module, *entry.channels).train(module.training))
    mark_narrowing(model, narrowing)
    return model


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Set a submodule by name; setattr would refuse the numbers of a Sequential."""
    parent, _, child = name.rpartition(".")
    child_table(model.get_submodule(parent))[child] = module


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, t in (*parameter_table(module).items(), *buffer_table(module).items()):
        if t is not None:
            yield name, t


def _numbers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The module's own integers, and tuples or lists of them."""
    for name, value in vars(module).items():
        several = isinstance(value, tuple | list) and len(value) > 0
        if all(type(v) is int for v in (value if several else (value,))):
            yield name, value


def _plain(value: Any) -> int | list[int]:
    return list(value) if isinstance(value, tuple | list) else value


def _replace(
    module: nn.Module, name: str, old: torch.Tensor, shape: list[int], replaced: dict[int, torch.Tensor]
) -> None:
    if len(shape) != old.dim() or any(new > whole for new, whole in zip(shape, old.shape, strict=True)):
        raise ValueError(f"{name} can't become {shape}")
    if id(old) not in replaced:
        # Zeros: values that no file has would otherwise be arbitrary.
        new = old.detach().new_zeros(shape)
        replaced[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    own, buffers = tensor_tables(module)
    (own if name in own else buffers)[name] = replaced[id(old)]
