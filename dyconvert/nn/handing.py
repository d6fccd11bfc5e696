"""Handing: two hooks around a block's own forward give the coefficients to the block's convs.

The user's forward runs as it stands. Before it, the block's predictor reads the block's input; while it runs, each
conv finds its coefficients by asking :func:`handed`; after it, also after an error, they are gone. The predictor is a
child of the first conv that it serves (`conv.block_predictor`), so nothing is added to the user's modules but hooks.
"""

import inspect
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from dyconvert.torch_internals.modules import forward_hooks, forward_pre_hooks, remove_hook

if TYPE_CHECKING:
    from dyconvert.nn.convs import DynamicConv
    from dyconvert.nn.mixture import Mixture
    from dyconvert.nn.predictor import CoefficientPredictor

# Each thread has a stack of its own, because threads may share a model; a stack, because blocks may be nested.
_local = threading.local()

# The form of `reads`: a parameter of the block's forward, and the path to a part of it.
_READS = re.compile(r"(?P<name>[^\[\]]+)(?P<items>(\[(\d+|'[^']*')\])*)")
_ITEM = re.compile(r"\[(?:(\d+)|'([^']*)')\]")


class Handing:
    """The knowledge of one block's hooks: the argument that its predictor reads, and the convs that it serves.

    Plain data, so that blocks can be copied and pickled, and replicas of a block use their own convs.

    Args:
        forward: the block's forward, whose signature says where the argument stands.
        reads: a parameter of the forward, `"x"`, or a part of one, `"x[0]"`, `"features['low']"`. Of a list or dict of
            maps, the predictor reads all of them.
        convs: the names of the convs within the block; the first one holds the predictor.

    Raises:
        ValueError: the forward has no such parameter.
    """

    def __init__(self, forward: Any, reads: str, convs: Sequence[str]) -> None:
        self.reads = reads
        self.convs = tuple(convs)
        self.index, self.keyword, self.items = _place(forward, reads)

    def give(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook, with keywords: predict the coefficients, and open them to the convs."""
        convs = [_descendant(block, name) for name in self.convs]
        predictor = getattr(convs[0], "block_predictor", None)
        if predictor is None:
            raise RuntimeError(
                f"{self.convs[0]} held the predictor of this {type(block).__name__}, and was taken out or replaced; "
                f"{', '.join(self.convs[1:])} can't be given coefficients. Convert the model with that conv left out: "
                "plan.skip(conv), or give its convs predictors of their own: plan.unshare(block)."
            )
        coefficients = predictor(self._read(args, kwargs))
        # By index: a tracer's stand-in for the tuple can't be iterated over.
        if _compiling():
            # A compiler would guard on the thread's stack, and compile again for every thread.
            for index, conv in enumerate(convs):
                if hasattr(conv, "_handed"):
                    conv._handed = coefficients[index]
        else:
            _frames().append(_Frame(convs, {id(conv): coefficients[index] for index, conv in enumerate(convs)}))

    def take(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A forward hook, called also after an error: undo what :meth:`give` did."""
        if _compiling():
            for name in self.convs:
                if hasattr(conv := _descendant(block, name), "_handed"):
                    conv._handed = None
        elif (frames := _frames()) and frames[-1].convs[0] is _descendant(block, self.convs[0]):
            # If not, `give` didn't run for this call: another hook failed before it.
            for conv in frames.pop().convs:
                if getattr(conv, "_handed", None) is not None:  # a compiled `give` in several graphs
                    conv._handed = None

    def _read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.keyword is not None and self.keyword in kwargs:
            value = kwargs[self.keyword]
        elif self.index is not None and self.index < len(args):
            value = args[self.index]
        else:
            raise RuntimeError(
                f"This block's predictor reads {self.reads}, which this call doesn't give. Give its convs predictors "
                "of their own: plan.unshare(block)."
            )
        for item in self.items:
            value = value[item]
        return value


def share(block: nn.Module, handing: Handing, predictor: "CoefficientPredictor") -> list[Any]:
    """Have `predictor` serve the convs that `handing` names, whenever `block` is called; the hooks' handles."""
    _descendant(block, handing.convs[0]).block_predictor = predictor
    return [
        block.register_forward_pre_hook(handing.give, with_kwargs=True),
        block.register_forward_hook(handing.take, always_call=True),
    ]


def handing_of(block: nn.Module) -> Handing | None:
    """The arguments of :func:`share` for this block; None: its convs share no predictor."""
    for hook in forward_pre_hooks(block).values():
        if is_handing(hook):
            return hook.__self__
    return None


def is_handing(hook: Any) -> bool:
    """Whether a forward hook is one of the two that hand coefficients."""
    return isinstance(getattr(hook, "__self__", None), Handing)


def unshare(block: nn.Module) -> None:
    """Take the two hooks off a block; the predictor stays where it is."""
    for hooks in (forward_pre_hooks(block), forward_hooks(block)):
        for number in [number for number, hook in hooks.items() if is_handing(hook)]:
            remove_hook(block, number)


def sharing_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module, Handing]]:
    """Every block of `model` whose convs share a predictor, with its name and its :class:`Handing`."""
    for name, module in model.named_modules():
        if (handing := handing_of(module)) is not None:
            yield name, module, handing


def handed(conv: "DynamicConv") -> "Mixture | None":
    """The mixture that the innermost block being called has for this conv."""
    if _compiling():
        return conv._handed
    for frame in reversed(_frames()):
        if id(conv) in frame.coefficients:
            return frame.coefficients[id(conv)]
    return conv._handed  # of a conv that is kept out of a compiled block


def mixture_for(conv: "DynamicConv", x: Tensor) -> "Mixture":
    """A conv's mixture for its input: of its own predictor, or handed by its block.

    Raises:
        RuntimeError: it has neither.
    """
    if conv.coefficient_predictor is not None:
        return conv.coefficient_predictor(x)[0]
    coefficients = handed(conv)
    if coefficients is None:
        raise RuntimeError(
            "This dynamic conv takes its coefficients from its block's predictor, but was called outside of the "
            "block's call: block.forward(x) instead of block(x), hooks that were removed, or gradient "
            "checkpointing inside of the block. Convert it with a predictor of its own: plan.unshare(conv), "
            "or scope='layer'; turn gradient checkpointing on before converting."
        )
    return coefficients


def maps_in(value: Any) -> list[Tensor]:
    """The floating-point tensors of a value that is one, or a list, tuple or dict of them, nested or not."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in maps_in(item)]
    return []


class _Frame(NamedTuple):
    """One call of a block: its convs, and the coefficients of each by its id."""

    convs: "list[DynamicConv]"
    coefficients: "dict[int, Mixture]"


def _frames() -> list[_Frame]:
    try:
        return _local.frames
    except AttributeError:
        _local.frames = []
        return _local.frames


def _compiling() -> bool:
    return torch.compiler.is_compiling() or torch.compiler.is_exporting()


def _descendant(module: nn.Module, name: str) -> Any:
    # Strict export of torch 2.9 doesn't trace `get_submodule`.
    for part in name.split("."):
        module = getattr(module, part, None)  # a user may have taken it out
    return module


def _place(forward: Any, reads: str) -> tuple[int | None, str | None, tuple[int | str, ...]]:
    """Where `reads` stands in a call of `forward`: its position, its keyword, and what to take out of it."""
    matched = _READS.fullmatch(reads)
    if matched is None:
        raise ValueError(f"{reads!r} names no argument")
    name = matched["name"]
    items = [int(number) if number else key for number, key in _ITEM.findall(matched["items"])]
    parameters = list(inspect.signature(forward).parameters.values())
    for index, parameter in enumerate(parameters):
        if parameter.name != name:
            continue
        if parameter.kind is parameter.VAR_POSITIONAL and items:
            return index + int(items[0]), None, tuple(items[1:])
        if parameter.kind is parameter.VAR_KEYWORD and items:
            return None, str(items[0]), tuple(items[1:])
        positional = parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        keyword = None if parameter.kind is parameter.POSITIONAL_ONLY else name
        return index if positional else None, keyword, tuple(items)
    raise ValueError(f"its forward has no parameter {name!r}")
