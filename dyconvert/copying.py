"""Copies of a model: whole, sharing tensors, or on the meta device; with or without the user's hooks."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dyconvert.errors import ModelError


def skeleton(model: nn.Module, tensor: Callable[[Tensor], Tensor]) -> nn.Module:
    """A deep copy of the model that has `tensor(t)` in place of each parameter and buffer t.

    Raises:
        ModelError: the model can't be copied.
    """
    memo: dict[int, Any] = {}
    # weight_norm's hook leaves a result of autograd as a plain attribute, which deepcopy refuses.
    attributes = (t for module in model.modules() for t in vars(module).values() if isinstance(t, Tensor))
    for t in (*model.parameters(), *model.buffers(), *attributes):
        with torch.no_grad():
            new = tensor(t)
        memo[id(t)] = nn.Parameter(new, t.requires_grad) if isinstance(t, nn.Parameter) else new
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} can't be copied: {error} "
            "copy.deepcopy(model) has to work; remove tensors that are no parameters or buffers, or that "
            "belong to an autograd graph."
        ) from error


def on_meta(model: nn.Module) -> nn.Module:
    """A deep copy of the model without its values: it has shapes, and takes no memory.

    Raises:
        ModelError: the model can't be copied.
    """
    return skeleton(model, lambda t: t.to("meta"))


def copied(model: nn.Module) -> nn.Module:
    """A deep copy of the model with tensors of its own.

    Raises:
        ModelError: the model can't be copied.
    """
    return skeleton(model, lambda t: t.detach().clone())


def clear_hooks(model: nn.Module) -> None:
    """Remove forward hooks: a user's hook is not to see a trial run's tensors."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            hooks.clear()
