"""Each private API of torch that is used, once, with its reason."""

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable)


def constant_result(function: F) -> F:
    """Mark a function whose result `torch.compile` may keep: what `torch.compiler.assume_constant_result` does.

    That one imports the compiler, which takes two to three seconds and which most processes never use.
    """
    function._dynamo_marked_constant = True
    return function
