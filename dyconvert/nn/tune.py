"""tune(model, example): the fastest strategy for every dynamic conv, measured once on this machine."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dyconvert.arguments import as_arguments, check_module
from dyconvert.errors import ModelError
from dyconvert.nn import choice
from dyconvert.nn.choosing import trials
from dyconvert.nn.convs import DynamicConv, DynamicConv1d, DynamicConv2d, DynamicConv3d
from dyconvert.nn.handing import mixture_for
from dyconvert.nn.measured_choices import Key
from dyconvert.nn.mixture import Mixing
from dyconvert.nn.operands import Geometry, Operands
from dyconvert.nn.trials import key


def tune(model: nn.Module, example: Any, *, repeats: int = 5) -> dict[str, str]:
    """Measure the strategies on every dynamic conv of `model`, and use the fastest from now on.

    What is found holds in this process, for convs of the same shapes, batch, dtype, device, mode (training or
    inference) and number of threads as here; other convs on a CPU are left to the rules. On a GPU every new shape is
    measured at its first call anyway (:mod:`dyconvert.nn.choice`); this measures again, before a graph is captured
    or a model compiled.

    Args:
        model: a converted model, in the mode to tune for: in training mode, forward and backward are measured.
        example: an input or the tuple of the forward's arguments, of the batch size to tune for.
        repeats: how often each strategy is measured; the lowest counts.

    Returns:
        each dynamic conv's name and its strategy; transposed and compressed ones have only one, and are left out

    Raises:
        ModelError: the model has no dynamic conv.
    """
    check_module(model)
    # A transposed conv has one way to be computed, and so has a compressed one: nothing to choose.
    kinds = (DynamicConv1d, DynamicConv2d, DynamicConv3d)
    convs = {name for name, module in model.named_modules() if isinstance(module, kinds) and module.mean is None}
    if not convs:
        raise ModelError(f"{type(model).__name__} has no dynamic conv to tune. Pass what dyconvert.convert returned.")
    calls = _observe(model, convs, as_arguments(example))
    choices = choice.current()
    chosen: dict[str, str] = {}
    measured: dict[Key, str] = {}  # convs of one shape share it
    for name, operands in calls.items():
        with torch.set_grad_enabled(model.training):
            shape = key(operands)
            if shape not in measured:
                file = not operands.x.is_cpu  # a CPU's convs aren't looked up in a file
                measured[shape] = choices.measure(shape, trials(operands), "native", repeats=repeats, file=file)
            chosen[name] = measured[shape]
    return chosen


def _observe(model: nn.Module, convs: set[str], arguments: tuple[Any, ...]) -> dict[str, Operands]:
    """The arguments that each of the `convs` is called with in one run, by name."""
    calls: dict[str, Operands] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(conv: DynamicConv, args: tuple[Tensor, ...], options: dict[str, Tensor]) -> None:
            x = args[0] if args else options["input"]
            mixing = conv.fold(mixture_for(conv, x))
            x, padding = conv.padded(x)

            def leaf(tensor: Tensor) -> Tensor:
                return tensor.detach().requires_grad_(model.training)

            mixing = Mixing(*(t if t is None else leaf(t) for t in mixing))
            geometry = Geometry(conv.stride, padding, conv.dilation, conv.groups)
            calls[name] = Operands(leaf(x), conv.weight, conv.bias, mixing, geometry)

        return hook

    hooks = [
        module.register_forward_pre_hook(note(name), with_kwargs=True)
        for name, module in model.named_modules()
        if name in convs
    ]
    try:
        with torch.no_grad(), choice.measuring("off"):
            model(*arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return calls
