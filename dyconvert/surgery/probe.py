"""Which convs see the images of their block in their order: shown by running the block, not believed.

A conv may take its coefficients from the block's predictor if each image of the predictor's input is the same image of
the conv's input. So the block runs on three images as they come, with two of them swapped, and rolled by one; the
conv's input has to follow both. Only the identity commutes with both permutations, so no reordering passes. Of two
images one is changed, for their one permutation commutes with itself: the same one has to change most in the conv's
input. Groups, windows or time folded into the batch show by the batch's size. What is chosen by the values of the
images (`x[mask]`, `if x.max() > 1`) may be chosen otherwise for other images, so no run shows it: convs that are called
after it have predictors of their own.
"""

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dyconvert.errors import brief
from dyconvert.nn.handing import maps_in
from dyconvert.randomness import random_state, same_state, set_random_state
from dyconvert.surgery.choices import Choices
from dyconvert.surgery.recording import Call
from dyconvert.torch_internals.modules import buffer_table, parameter_table
from dyconvert.torch_internals.trees import tree_flatten, tree_unflatten

# How far rounding takes the same image in another place of the batch, relative to the largest value.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}

OTHER_BATCH = "it sees another batch than its block (groups, windows, time or parts folded into or cut from it)"
OTHER_ORDER = "it sees the images in another order, or mixed with one another"
BY_VALUE = "its block chooses by the values of the images (a mask, a branch) before it is called"


class Prober:
    """Runs the blocks of a copy of a model, which it may wear out, and remembers each kind of block.

    Args:
        convs: the names of the convs to be converted.
    """

    def __init__(self, model: nn.Module, convs: set[str]) -> None:
        self._known: dict[Any, dict[str, str]] = {}
        self._inputs: dict[int, list[Any]] = {}
        self._choices = Choices()
        self._chosen: set[int] = set()
        for name, module in model.named_modules():
            if name in convs:
                module.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, conv: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = args[0] if args else kwargs.get("input")
        self._inputs.setdefault(id(conv), []).append(value.detach().clone() if isinstance(value, Tensor) else None)
        if self._choices.made:
            self._chosen.add(id(conv))

    def unfit(self, block: nn.Module, convs: Mapping[str, nn.Module], call: Call, read: Any) -> dict[str, str]:
        """Why convs of a block can't take coefficients that are predicted from `read`, a value in the call's arguments.

        Args:
            convs: those that want to share, by their names within the block.

        Returns:
            a reason for each conv that doesn't see the block's images one for one; nothing for the others
        """
        key = _kind(block), tuple(convs), _signature(call), _places(call, read)
        if key not in self._known:
            self._known[key] = self._unfit(block, convs, call, read)
        return self._known[key]

    def _unfit(self, block: nn.Module, convs: Mapping[str, nn.Module], call: Call, read: Any) -> dict[str, str]:
        batch = maps_in(read)[0].shape[0]
        reasons: dict[str, str] = {}
        # Code may branch on the number of images, on their size and on the mode. Maps of the model's own size are the
        # dearest to run on, so two images have them, and the rest is shown on small ones, where the block takes them.
        for images, sizes, training in (
            (2, (False,), False),
            (3, (True, False), False),
            (8, (True, False), False),
            (4, (True, False), True),
        ):
            failure: Exception | None = None
            for small in sizes:
                try:
                    unfit = self._unfit_now(block, convs, _grown(call, batch, images, small), images, training)
                except Exception as error:
                    failure = error
                    continue
                for name, reason in unfit.items():
                    reasons.setdefault(name, reason)
                break
            else:
                if not training:  # a block that can't be trained on this shows nothing in training
                    why = f"it can't be run on {images} images by itself ({brief(failure)})"
                    return dict.fromkeys(convs, why)
        return reasons

    def _unfit_now(
        self,
        block: nn.Module,
        convs: Mapping[str, nn.Module],
        call: Call,
        images: int,
        training: bool,
    ) -> dict[str, str]:
        state = random_state()
        changes = _changes(call, images)
        self._chosen.clear()
        try:
            seen = []
            for index, (changed, _) in enumerate(changes):
                set_random_state(state)
                seen.append(self._run(block, convs, changed, training))
                if index == 0 and training and not same_state(state, random_state()):
                    break  # random draws stand at a place in the batch, and don't move with the image
        finally:
            set_random_state(state)
        reasons = {}
        for name in convs:
            first = seen[0].get(name, [])
            if len(first) != 1:
                if not training:
                    reasons[name] = f"it is called {len(first)} times in a call of its block"
                continue
            if not isinstance(first[0], Tensor) or first[0].dim() == 0 or first[0].shape[0] != images:
                reasons[name] = OTHER_BATCH
                continue
            if id(convs[name]) in self._chosen:
                reasons[name] = BY_VALUE
                continue
            for (_, follows), other in zip(changes[1:], seen[1:], strict=False):
                if len(other.get(name, [])) != 1 or not follows(first[0], other[name][0]):
                    reasons[name] = OTHER_ORDER
        return reasons

    def _run(
        self, block: nn.Module, convs: Mapping[str, nn.Module], call: Call, training: bool
    ) -> dict[str, list[Any]]:
        """What each conv is given in one call of the block."""
        self._inputs.clear()
        block.train(training)
        with torch.no_grad(), self._choices:
            block(*call.args, **call.kwargs)
        return {name: self._inputs.get(id(conv), []) for name, conv in convs.items()}

    def feeding(
        self, block: nn.Module, convs: Mapping[str, nn.Module], call: Call, candidates: Mapping[str, Any]
    ) -> list[str]:
        """The `candidates`, values in the call's arguments by name, that reach every conv; found by changing each."""
        state = random_state()
        try:
            base = self._run(block, convs, _copied(call), False)
            reaching = []
            for name, value in candidates.items():
                set_random_state(state)
                changed = self._run(block, convs, _disturbed(call, value), False)
                if all(_differ(base[conv], changed[conv]) for conv in convs):
                    reaching.append(name)
            return reaching
        finally:
            set_random_state(state)


def _changes(call: Call, images: int) -> list[tuple[Call, Callable[[Tensor, Any], bool]]]:
    """A call with its images as they come, then changed; each with a test of what a conv is given before and after."""

    def follows(permutation: list[int]) -> Callable[[Tensor, Any], bool]:
        return lambda before, after: _same(before[permutation], after)

    if images == 2:  # the one permutation of two images commutes with itself
        return [(_permuted(call, 2, [0, 1]), follows([0, 1])), (_first_disturbed(call), _first_changed)]
    permutations = [list(range(images)), [1, 0, *range(2, images)], [images - 1, *range(images - 1)]]
    return [(_permuted(call, images, permutation), follows(permutation)) for permutation in permutations]


def _first_changed(before: Tensor, after: Any) -> bool:
    """Whether no other of two images changed more than the first."""
    if not isinstance(after, Tensor) or before.shape != after.shape or before.dtype != after.dtype:
        return False
    if before.is_meta or not (before.is_floating_point() or before.is_complex()):
        return True
    first, second = (before - after).nan_to_num().abs().flatten(1).amax(1).tolist() if before.numel() else (0.0, 0.0)
    return first >= second


def _same(a: Tensor, b: Any) -> bool:
    if not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.is_meta or torch.equal(a, b):
        return True
    if not (a.is_floating_point() or a.is_complex()):
        return False
    a, b = (t.nan_to_num() for t in (a, b))
    size = a.abs().max().item()
    apart = (a - b).abs().max().item()
    # Images that hardly differ say nothing unless they are told apart.
    distance = (a - a.roll(1, 0)).abs().amax(dim=tuple(range(1, a.dim()))).min().item()
    return apart <= min(_TOLERANCE.get(a.dtype, 1e-3) * size, 0.1 * distance)


def _differ(a: Sequence[Any], b: Sequence[Any]) -> bool:
    def unequal(x: Any, y: Any) -> bool:
        return isinstance(x, Tensor) and isinstance(y, Tensor) and (x.shape != y.shape or not torch.equal(x, y))

    return bool(a) and (len(a) != len(b) or any(unequal(x, y) for x, y in zip(a, b, strict=True)))


def _changed(call: Call, change: Callable[[Tensor], Tensor]) -> Call:
    leaves, form = tree_flatten((call.args, call.kwargs))
    known: dict[int, Tensor] = {}  # an argument that is given twice stays one
    new = []
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            if id(leaf) not in known:
                known[id(leaf)] = change(leaf)
            leaf = known[id(leaf)]
        new.append(leaf)
    return Call(*tree_unflatten(new, form))


def _copied(call: Call) -> Call:
    return _changed(call, torch.clone)  # a forward may write into its input


def _permuted(call: Call, images: int, permutation: list[int]) -> Call:
    return _changed(call, lambda t: t[permutation] if t.dim() and t.shape[0] == images else t.clone())


def _first_disturbed(call: Call) -> Call:
    generator = torch.Generator("cpu").manual_seed(2)

    def disturb(t: Tensor) -> Tensor:
        t = t.clone()
        if t.dim() and t.shape[0] == 2 and t.is_floating_point():
            t[0] += _noise(t[0], generator)
        return t

    return _changed(call, disturb)


def _disturbed(call: Call, value: Any) -> Call:
    disturbed = {id(t) for t in maps_in(value)}
    generator = torch.Generator("cpu").manual_seed(1)
    return _changed(call, lambda t: t + _noise(t, generator) if id(t) in disturbed else t.clone())


def _grown(call: Call, batch: int, images: int, small: bool) -> Call:
    """The call with this many different images in each tensor that has one per image; with maps cut where `small`."""
    generator = torch.Generator("cpu").manual_seed(0)

    def grow(t: Tensor) -> Tensor:
        if small and t.dim() >= 3:
            t = t[(slice(None), slice(None), *[slice(0, _shorter(length)) for length in t.shape[2:]])]
        if t.dim() == 0 or t.shape[0] != batch:
            return t.clone()
        times = -(-images // batch)
        many = t.repeat(times, *[1] * (t.dim() - 1))[:images] if batch else t.new_zeros(images, *t.shape[1:])
        return many + _noise(many, generator) if t.is_floating_point() else many

    return _changed(call, grow)


def _shorter(length: int) -> int:
    """A half, a quarter, ... of a map's length, of 8 to 15 pixels; a shorter length is halved once."""
    if 4 <= length < 16:
        return length // 2
    while length >= 16:
        length //= 2
    return length


def _noise(t: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(t.shape, generator=generator, device="cpu").to(t.device, t.dtype)
    size = t.nan_to_num(posinf=0.0, neginf=0.0).std().item() if t.numel() > 1 and not t.is_meta else 0.0
    return noise * (size if size > 0 else 1.0)


def _signature(call: Call) -> Any:
    leaves, form = tree_flatten((call.args, call.kwargs))
    plain = [(tuple(x.shape), x.dtype) if isinstance(x, Tensor) else _plain(x) for x in leaves]
    return str(form), tuple(plain)


def _places(call: Call, read: Any) -> tuple[int, ...]:
    ids = {id(t) for t in maps_in(read)}
    leaves = tree_flatten((call.args, call.kwargs))[0]
    return tuple(index for index, leaf in enumerate(leaves) if id(leaf) in ids)


_OWN = vars(nn.Module()).keys() - {"training"}


def _kind(block: nn.Module) -> Any:
    """What blocks have in common that do the same but for their weights' values."""
    return tuple(
        (
            name,
            type(module),
            tuple((key, tuple(t.shape), t.dtype) for key, t in parameter_table(module).items() if t is not None),
            tuple((key, tuple(t.shape), t.dtype) for key, t in buffer_table(module).items() if t is not None),
            tuple(sorted((key, _plain(value)) for key, value in vars(module).items() if key not in _OWN)),
        )
        for name, module in block.named_modules()
    )


def _plain(value: Any) -> str:
    """A text that is equal for equal plain values and equal functions; other objects are equal to themselves only."""
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__}({','.join(map(_plain, value))})"
    if isinstance(value, types.MethodType):
        return f"{_plain(value.__func__)} of {type(value.__self__).__name__}"
    return f"{type(value).__name__} {id(value)}"
