"""The user's forward hooks: which modules have some, and whether one uses a conv's weight."""

import functools
import types
from typing import Any

from torch import nn

from dyconvert.nn.handing import is_handing
from dyconvert.torch_internals.modules import forward_hooks, forward_pre_hooks

_WEIGHTS = {"weight", "bias", "weight_orig"}


def hooks_of(module: nn.Module) -> list[Any]:
    """A module's forward hooks, before and after, but for those that hand coefficients."""
    hooks = *forward_hooks(module).values(), *forward_pre_hooks(module).values()
    return [hook for hook in hooks if not is_handing(hook)]


def is_hooked(module: nn.Module) -> bool:
    """Whether the user has put forward hooks on it."""
    return bool(hooks_of(module))


def has_pre_hooks(module: nn.Module) -> bool:
    """Whether some of them run before its forward."""
    return any(not is_handing(hook) for hook in forward_pre_hooks(module).values())


def uses_weights(module: nn.Module) -> bool:
    """Whether the code of one of a conv's hooks speaks of its weight or bias: hooks aren't run when planning."""
    return any(_WEIGHTS & _names(hook) for hook in hooks_of(module))


def _names(hook: Any) -> set[str]:
    """The attributes that a function's code speaks of, those of the functions within it included."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    function = getattr(hook, "__func__", hook)
    if not isinstance(function, types.FunctionType):
        function = getattr(type(hook).__call__, "__func__", type(hook).__call__)
    code = getattr(function, "__code__", None)
    return set() if code is None else _of_code(code)


def _of_code(code: types.CodeType) -> set[str]:
    inner = [_of_code(each) for each in code.co_consts if isinstance(each, types.CodeType)]
    return set(code.co_names).union(*inner)
