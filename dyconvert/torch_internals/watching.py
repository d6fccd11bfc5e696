"""Who looks at the operators that run: dispatch modes, functorch's transforms, forward-mode AD, autograd's graph."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils import _python_dispatch

# Sees every operator that a model runs, in eager mode; torch documents it in a note, and has no public name for it.
DispatchMode = _python_dispatch.TorchDispatchMode

_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch = torch._C._are_functorch_transforms_active


def observed() -> bool:
    """Whether a dispatch mode, a functorch transform or forward-mode AD is active: these need plain operators.

    Asked at every eager conv, about 0.3 us. There is no public question for any of the three. Renamed, the first two
    fail at import, and the third at the first conv.
    """
    return _dispatch_modes() > 0 or _functorch() or forward_ad._current_level >= 0


def without_modes() -> AbstractContextManager[Any]:
    """A context whose operators no :class:`DispatchMode` sees: for what hooks compute while a model is watched."""
    return _python_dispatch._disable_current_modes()


def operator_of(grad_fn: Any) -> str:
    """The operator that an autograd node is of: `Relu` for ReluBackward0; a function of Python's by its class.

    Names are torch's to change. Narrowing keeps the channels that pass through an operator it doesn't know.
    """
    name = grad_fn.name() if hasattr(grad_fn, "name") else type(grad_fn).__name__
    return name.rpartition(".")[2].rstrip("0123456789").removesuffix("Backward")


def saved_argument(grad_fn: Any, name: str) -> Any:
    """What an autograd node kept of an operator's argument, as `dim`; None where it has no such thing.

    Renamed, narrowing takes the argument for one that it doesn't know, and keeps the channels.
    """
    return getattr(grad_fn, f"_saved_{name}", None)


def count_totals_only(counter: Any) -> Any:
    """Have a `FlopCounterMode` count a whole run, and not ask which module an operator ran in; return it.

    Its `mod_tracker` finds that out by hooks on gradients, which fail in a forward that calls `autograd.grad`. If the
    attribute goes, such models can't be counted.
    """
    counter.mod_tracker = _NoModules()
    return counter


class _NoModules(nullcontext):  # type: ignore[type-arg]
    """A tracker for which everything runs in the whole."""

    parents = frozenset({"Global"})

    def __exit__(self, *exception: Any) -> None:
        """As `FlopCounterMode` calls it: without arguments."""


def multiply_adds(counter: Any, model: nn.Module) -> dict[str, int]:
    """What a `FlopCounterMode` counted of a model ("") and of each module in it, by name.

    The counter documents its total alone. Its table calls that "Global", and a module by the class of the model and the
    module's name; by other names a report's figures of blocks would be 0. Two operations are one multiply-add.
    """
    root = f"{type(model).__name__}."
    by_module: dict[str, int] = {}
    for name, operations in counter.get_flop_counts().items():
        if name == "Global":
            by_module[""] = sum(operations.values()) // 2
        elif name.startswith(root):
            by_module[name.removeprefix(root)] = sum(operations.values()) // 2
    return by_module
