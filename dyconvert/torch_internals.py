"""Each private API of torch that is used, once, with its reason."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from torch.utils import _python_dispatch

F = TypeVar("F", bound=Callable)

# Sees every operator that a model runs, in eager mode; torch documents it in a note, and has no public name for it.
DispatchMode = _python_dispatch.TorchDispatchMode


def without_modes() -> AbstractContextManager[Any]:
    """A context whose operators no :class:`DispatchMode` sees: for what hooks compute while a model is watched."""
    return _python_dispatch._disable_current_modes()


def constant_result(function: F) -> F:
    """Mark a function whose result `torch.compile` may keep: what `torch.compiler.assume_constant_result` does.

    That one imports the compiler, which takes two to three seconds and which most processes never use.
    """
    function._dynamo_marked_constant = True
    return function
