"""Copies of a model: whole, sharing tensors, or on the meta device; with or without the user's hooks."""

import copy
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode

from dyconvert.closures import CopiedFunctions
from dyconvert.errors import ModelError
from dyconvert.nn.handing import is_handing
from dyconvert.torch_internals.copies import fill_graph_module, modes_of
from dyconvert.torch_internals.modules import (
    accumulation_hooks,
    forward_hooks,
    forward_pre_hooks,
    gradient_hooks,
    remove_hook,
)


def skeleton(model: nn.Module, tensor: Callable[[Tensor], Tensor]) -> nn.Module:
    """A deep copy of the model that has `tensor(t)` in place of each parameter and buffer t.

    Raises:
        ModelError: the model can't be copied.
    """
    memo: dict[int, Any] = {}
    for t in (*model.parameters(), *model.buffers()):
        with torch.no_grad():
            new = tensor(t)
        memo[id(t)] = nn.Parameter(new, t.requires_grad) if isinstance(t, nn.Parameter) else new
    try:
        _copy_scripts(model, memo)
        functions = CopiedFunctions(model)
        functions.begin(memo)
        with _Tensors(tensor):
            result = copy.deepcopy(model, memo)
            for module in model.modules():
                if isinstance(module, GraphModule):
                    fill_graph_module(memo[id(module)], memo[id(vars(module))], modes_of(vars(module)))
            functions.end(memo)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} can't be copied: {error} "
            "copy.deepcopy(model) has to work: remove from it what can't be copied, such as locks and open files."
        ) from error
    return result


def _copy_scripts(model: nn.Module, memo: dict[int, Any]) -> None:
    """Put into a memo of `deepcopy` copies of the scripted and traced modules in a model, with the memo's tensors.

    A deep copy of a `ScriptModule` goes on computing with the original's parameters, and gives them the gradients; what
    was saved and loaded doesn't. On the meta device it takes no tensors, so there the copy is left to `deepcopy`.
    """
    inside: set[int] = set()
    for module in model.modules():
        if not isinstance(module, torch.jit.ScriptModule) or id(module) in inside:
            continue
        inside |= {id(part) for part in module.modules()}
        tensors = [*module.parameters(), *module.buffers()]
        if any(memo[id(t)].is_meta for t in tensors):
            continue
        file = io.BytesIO()
        torch.jit.save(module, file)
        file.seek(0)
        copied = torch.jit.load(file)
        for old, new in zip(tensors, [*copied.parameters(), *copied.buffers()], strict=True):
            new.data = memo[id(old)].detach()
            new.requires_grad_(old.requires_grad)
        memo[id(module)] = copied


class _Tensors(TorchFunctionMode):
    """Copies tensors that lie anywhere in a model by `tensor`: also results of autograd, which `deepcopy` refuses."""

    def __init__(self, tensor: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.tensor = tensor

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not Tensor.__deepcopy__:
            return function(*args, **(kwargs or {}))
        t, memo = args
        if id(t) not in memo:
            with torch.no_grad():
                memo[id(t)] = self.tensor(t)
        return memo[id(t)]


def on_meta(model: nn.Module) -> nn.Module:
    """A deep copy of the model without its values: it has shapes, and takes no memory.

    Raises:
        ModelError: the model can't be copied.
    """
    return skeleton(model, lambda t: t.to("meta"))


def sharing_copy(model: nn.Module) -> nn.Module:
    """A deep copy for a run: it shares the parameters' values; what a forward may write to, as buffers, is its own.

    Raises:
        ModelError: the model can't be copied.
    """
    return skeleton(model, lambda t: t.detach() if isinstance(t, nn.Parameter) else t.detach().clone())


def copied(model: nn.Module) -> nn.Module:
    """A deep copy of the model with tensors of its own.

    Raises:
        ModelError: the model can't be copied.
    """
    return skeleton(model, lambda t: t.detach().clone())


def in_eval_mode(model: nn.Module) -> nn.Module:
    """The model itself, switched to eval mode by its own `eval`, which may return nothing where the user wrote it."""
    model.eval()
    return model


def keep_tensor_hooks(model: nn.Module, copy: nn.Module) -> None:
    """Register the hooks on a model's parameters on those of its copy as well, which `deepcopy` doesn't."""
    copies = dict(copy.named_parameters())
    for name, parameter in model.named_parameters():
        new = copies.get(name)
        if new is None or new is parameter or not new.requires_grad:
            continue
        for hook in gradient_hooks(parameter):
            new.register_hook(hook)
        for hook in accumulation_hooks(parameter):
            new.register_post_accumulate_grad_hook(hook)


def clear_hooks(model: nn.Module) -> None:
    """Remove the user's forward hooks: they are not to see a trial run's tensors. Those that hand coefficients stay."""
    for module in model.modules():
        for hooks in (forward_hooks(module), forward_pre_hooks(module)):
            for number in [number for number, hook in hooks.items() if not is_handing(hook)]:
                remove_hook(module, number)
