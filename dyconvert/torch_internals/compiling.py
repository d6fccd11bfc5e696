"""What `torch.compile` leaves behind and looks for, without importing it: that takes two to three seconds."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

F = TypeVar("F", bound=Callable[..., Any])

# The attribute of a compiled model that holds the original; its state dict's keys start with it.
ORIGINAL = "_orig_mod"


def is_compiled(model: nn.Module) -> bool:
    """Whether a model is what `torch.compile` returned: by its class's name, so that the compiler isn't imported."""
    return type(model).__name__ == "OptimizedModule" and hasattr(model, ORIGINAL)


def constant_result(function: F) -> F:
    """Mark a function whose result `torch.compile` may keep: what `torch.compiler.assume_constant_result` does.

    That one imports the compiler. Renamed, a compiled model's graph is broken at every conv.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def compile_error() -> type[Exception]:
    """What calls of a compiled model raise where it can't be compiled; torch has no public name for it."""
    from torch._dynamo.exc import TorchDynamoException

    return TorchDynamoException
