"""Models that are built for a file: their parameters without values, and no more of them than the file can fill."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules import module as hooks

from dyconvert.errors import ModelError
from dyconvert.limits import MODEL_BYTES, MODULES_PER_TENSOR, TABLE_BYTES
from dyconvert.torch_internals.trees import tree_leaves
from dyconvert.torch_internals.watching import DispatchMode


class TooLargeError(ModelError):
    """A model would be far larger than the file that it is built for."""


@contextlib.contextmanager
def bounded(tensors: int, values: bool) -> Iterator[None]:
    """Within the block, no model is made that is far larger than a file.

    Args:
        tensors: how many the file has.
        values: whether parameters have values. Without, they are on the meta device; buffers, which a file needn't
            hold, are not.

    Raises:
        TooLargeError: the model has far more modules or parameters than the file can fill.
    """
    limit, made, size, thread = MODULES_PER_TENSOR * tensors + 1000, 0, 0, threading.get_ident()

    def count(value: torch.Tensor | None = None) -> None:
        nonlocal made, size
        made, size = made + 1, size + (value.nbytes if value is not None and values else 0)
        if made > limit:
            raise TooLargeError(f"it has more than {limit} parts, and the weights file has {tensors} tensors")
        if size > MODEL_BYTES:
            raise TooLargeError(f"it has more than {MODEL_BYTES / 1e9:g} GB of parameters")

    def parameter(module: nn.Module, name: str, value: nn.Parameter | None) -> nn.Parameter | None:
        if threading.get_ident() != thread or value is None:
            return None
        count(value)
        if values or value.is_meta or type(value) is not nn.Parameter:
            return None
        return nn.Parameter(torch.empty_like(value, device="meta"), value.requires_grad)

    def child(module: nn.Module, name: str, value: nn.Module | None) -> None:
        if threading.get_ident() == thread:
            count()

    handles = [
        # torch takes what such a hook returns; its annotation says None.
        hooks.register_module_parameter_registration_hook(cast(Any, parameter)),
        hooks.register_module_module_registration_hook(child),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Bounded(DispatchMode):
    """Refuses to make a tensor that is larger than any architecture's."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.nbytes > TABLE_BYTES:
                raise TooLargeError(f"it makes a tensor of {tensor.nbytes / 1e9:.1f} GB")
        return result


def check_tensors(build: Callable[[], object]) -> None:
    """See on the meta device, where nothing takes memory or time, that building makes no tensor of gigabytes.

    Raises:
        TooLargeError: it does.
    """
    try:
        with torch.device("meta"), _Bounded():
            build()
    except TooLargeError:
        raise
    except Exception:
        pass  # a few look at values; what else is wrong with it is said when it is built


def lost_values(model: nn.Module) -> bool:
    """Whether something that no file holds was computed of parameters, and so has no values."""
    buffers = any(buffer.is_meta for buffer in model.buffers())
    attributes = (t for module in model.modules() for t in vars(module).values() if isinstance(t, torch.Tensor))
    return buffers or any(t.is_meta for t in attributes)
