"""What runs do: the calls of modules, the torch functions, and which functions are given a conv's weight."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from dyconvert.torch_internals.modules import ConvNd
from dyconvert.torch_internals.trees import tree_flatten, tree_map_only

# Attributes that a bank answers as its static weight does, so code that asks for them may go on.
HARMLESS = {"dtype", "device", "requires_grad", "is_cuda", "is_meta", "layout", "ndim", "dim", "is_leaf", "grad_fn"}
HARMLESS |= {"is_floating_point", "is_complex", "element_size", "is_sparse", "is_quantized", "names"}
# In the place of a function's name: a copy of the model ran the conv of the original.
NOT_COPIED = "a copy uses the original's"
META = torch.device("meta")


@dataclass
class Call:
    """One call of a module: its arguments, on the meta device where it was observed, and the modules around it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    within: tuple[str, ...] = ()


class FunctionsCalled(TorchFunctionMode):
    """Keeps what torch functions are called, in order: their names, the shapes they are given, and numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Any] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.see(name_of(function), args, kwargs)
        return function(*args, **kwargs)

    def see(self, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        """One call."""
        self.functions.append((name, _form(args), tuple((key, _form(value)) for key, value in kwargs.items())))


def name_of(function: Any) -> str:
    """What a torch function is called; of a tensor's attribute its name, as `shape`."""
    name = getattr(function, "__name__", "")
    if name == "__get__":
        name = getattr(function.__self__, "__name__", name)
    return name or str(resolve_name(function))


def _form(value: Any) -> Any:
    """What can be compared with another run's: shapes, numbers and texts."""
    if isinstance(value, Tensor):
        return (*value.shape, value.dtype) if not value.is_nested else "nested"
    if isinstance(value, (list, tuple)):
        return tuple(map(_form, value))
    plain = isinstance(value, (bool, int, float, str, torch.dtype))
    return repr(value) if plain else type(value).__name__


class WeightReads(FunctionsCalled):
    """Notices every function that is given a watched conv's parameter while that conv isn't being called.

    Args:
        owners: the watched convs' names, by the `id` of a parameter of theirs.
        originals: the same of the model of which a copy runs: what the copy reads there counts as `NOT_COPIED`.
        reads: takes the functions' names, by those of the convs.
    """

    def __init__(
        self,
        owners: Mapping[int, str],
        originals: Mapping[int, str],
        stack: "CallStack",
        reads: dict[str, set[str]],
    ) -> None:
        super().__init__()
        self.owners = owners
        self.originals = originals
        self.stack = stack
        self.reads = reads

    def see(self, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        super().see(name, args, kwargs)
        for value in (*args, *kwargs.values()):
            for t in value if isinstance(value, (list, tuple)) else (value,):
                if not isinstance(t, Tensor):
                    continue
                owner = self.owners.get(id(t))
                if owner is None and (original := self.originals.get(id(t))):
                    self.reads.setdefault(original, set()).add(NOT_COPIED)
                if owner is not None and owner not in self.stack.names() and name not in HARMLESS:
                    self.reads.setdefault(owner, set()).add(name)


class CallStack(threading.local):
    """The watched modules that are being called in this thread, outermost first."""

    def __init__(self) -> None:
        self._names: list[str] = []

    def names(self) -> list[str]:
        return self._names


@contextmanager
def recording(model: nn.Module, watched: set[str]) -> Iterator[tuple[dict[str, list[Call]], CallStack]]:
    """Within it, every call of a watched module is kept, by name, and the stack says which are being called."""
    calls: dict[str, list[Call]] = {}
    stack = CallStack()
    handles = []

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.setdefault(name, []).append(Call(meta(args), meta(kwargs), tuple(stack.names())))
            stack.names().append(name)

        return hook

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if stack.names():
            stack.names().pop()

    for name, module in model.named_modules():
        if name in watched:
            handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
            handles.append(module.register_forward_hook(after, always_call=True))
    try:
        yield calls, stack
    finally:
        for handle in handles:
            handle.remove()


def meta(values: Any) -> Any:
    """`values` with every tensor in them on the meta device."""
    return tree_map_only(Tensor, lambda t: t.detach().to(META), values)


def owners(model: nn.Module, watched: set[str]) -> dict[int, str]:
    return {
        id(parameter): name
        for name, module in model.named_modules()
        if name in watched and isinstance(module, ConvNd)
        for parameter in module.parameters(recurse=False)
    }


def shapes(value: Any) -> list[Any]:
    """The shapes and types of a value's leaves, by which two runs' outputs are compared."""
    return [
        tuple(leaf.shape) if isinstance(leaf, Tensor) and not leaf.is_nested else type(leaf).__name__
        for leaf in tree_flatten(value)[0]
    ]
