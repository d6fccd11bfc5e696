"""What becomes of each layer's output: which batch norm normalises it, and which residual sum it goes into.

Modules' hooks don't see an addition in a block's forward. So a run is watched operator by operator, and the
operators are numbered: a model does the same ones, in the same order, for every batch in eval mode.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


@dataclass(frozen=True)
class Aim:
    """Where a layer's output ends up, as far as it gets there by additions and factors.

    Attributes:
        operator: number of the operator whose output it is: the layer itself, its batch norm, or the sum.
        norm: name of the batch norm in between.
        other: number of the operator whose output is added, and was there before the layer ran; None: no sum.
        channels_first: the channels are dimension 1; otherwise they are the last.
        clamp: the range that a ReLU or ReLU6 leaves of it, where nothing else reads it.
    """

    operator: int
    norm: str | None
    other: int | None
    channels_first: bool
    clamp: tuple[float, float] | None = None


# What a ReLU and a ReLU6 leave of their input.
_CLAMPS = {
    "relu": (0.0, float("inf")),
    "relu_": (0.0, float("inf")),
    "hardtanh": (0.0, 6.0),
    "hardtanh_": (0.0, 6.0),
}


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.seen(func, args, output, self.count)
        self.count += 1
        return output

    def seen(self, func: Any, args: Any, output: Any, number: int) -> None:
        raise NotImplementedError


class _Recorder(_Operators):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.inputs: list[list[int | None]] = []
        self.made: dict[int, int] = {}
        self._alive: list[Any] = []  # so that no two tensors have the same id

    def seen(self, func: Any, args: Any, output: Any, number: int) -> None:
        tensors = [leaf for leaf in tree_flatten(args)[0] if isinstance(leaf, Tensor)]
        self.names.append(func.__name__)
        self.inputs.append([self.made.get(id(t)) for t in tensors])
        self._alive.append((tensors, output))
        for leaf in tree_flatten(output)[0]:
            if isinstance(leaf, Tensor):
                self.made[id(leaf)] = number


def find_aims(model: nn.Module, example: tuple[Any, ...]) -> dict[str, Aim]:
    """Run the model once, in eval mode, and find the aim of every conv and linear that was called once."""
    recorder = _Recorder()
    of_layer: dict[str, int] = {}
    several: set[str] = set()
    of_norm: dict[int, str] = {}
    handles = []

    def hook(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            number = recorder.made.get(id(output))
            if number is None:
                return
            if isinstance(module, _BatchNorm):
                of_norm[number] = name
            else:
                several.update({name} & of_layer.keys())
                of_layer[name] = number

        return note

    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, _ConvNd | nn.Linear | _BatchNorm):
            handles.append(module.register_forward_hook(hook(name)))
    try:
        with torch.no_grad(), recorder:
            model(*example)
    finally:
        for handle in handles:
            handle.remove()
    readers = defaultdict(list)
    for number, inputs in enumerate(recorder.inputs):
        for source in inputs:
            readers[source].append(number)
    aims = {}
    for name, number in of_layer.items():
        if name in several:
            continue
        at, norm, other = number, None, None
        if len(readers[at]) == 1 and readers[at][0] in of_norm:
            at = readers[at][0]
            norm = of_norm[at]
        if len(readers[at]) == 1 and recorder.names[readers[at][0]] in ("add.Tensor", "add_.Tensor"):
            total = readers[at][0]
            others = [source for source in recorder.inputs[total] if source != at]
            # A sum with what is computed later is that one's to reconstruct.
            if len(others) == 1 and others[0] is not None and others[0] < number:
                at, other = total, others[0]
        after = [recorder.names[reader].partition(".")[0] for reader in readers[at]]
        clamp = _CLAMPS.get(after[0]) if len(after) == 1 else None
        aims[name] = Aim(at, norm, other, isinstance(modules[name], _ConvNd), clamp)
    return aims


class Listener(_Operators):
    """Hands the outputs of some operators to those who asked for them, while a model runs."""

    def __init__(self, wanted: dict[int, list[Callable[[Tensor], None]]]) -> None:
        super().__init__()
        self.wanted = wanted

    def seen(self, func: Any, args: Any, output: Any, number: int) -> None:
        for tell in self.wanted.get(number, ()):
            tell(output if isinstance(output, Tensor) else output[0])
