"""What a run decides by the values of its tensors: another run, on other values, may decide otherwise."""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dyconvert.torch_internals.watching import DispatchMode


class Choices:
    """Whether a result's shape, or a Python number, came to depend on the values of tensors in this context."""

    def __init__(self) -> None:
        self.made = False

    def __enter__(self) -> None:
        self.made = False
        self._modes = ExitStack()
        self._modes.enter_context(_ToPython(self))
        self._modes.enter_context(_ByValue(self))

    def __exit__(self, *exception: Any) -> None:
        self._modes.close()


class _ToPython(TorchFunctionMode):
    """Sees whole tensors become Python's or numpy's, which calls no operator."""

    def __init__(self, choices: Choices) -> None:
        super().__init__()
        self.choices = choices

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (Tensor.tolist, Tensor.numpy, Tensor.__array__):
            self.choices.made = True
        return function(*args, **(kwargs or {}))


class _ByValue(DispatchMode):
    """Sees operators whose result's shape, or whose number, depends on values: masks, `nonzero`, `item`, branches."""

    def __init__(self, choices: Choices) -> None:
        super().__init__()
        self.choices = choices

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.index.Tensor:  # an index of numbers gives the result its own shape
            self.choices.made |= any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        elif {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(function.tags):
            self.choices.made = True
        return function(*args, **(kwargs or {}))
