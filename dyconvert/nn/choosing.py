"""Which strategy computes a dynamic conv: by rule, or the fastest that was measured."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from dyconvert.nn import choice, engines, fitting, recompute
from dyconvert.nn.measured_choices import Choices
from dyconvert.nn.mixture import Mixing
from dyconvert.nn.native import size_of_output
from dyconvert.nn.operands import Geometry, Operands
from dyconvert.nn.running import (
    kernels_are_small,
    number_the_padding,
    run,
)
from dyconvert.nn.trials import is_tracing, key, needs_backward, trial
from dyconvert.nn.triton import engine as triton
from dyconvert.torch_internals.watching import observed


def choose(operands: Operands) -> str:
    """The strategy by name; a shape that isn't known may be measured here."""
    x = operands.x
    batch = x.shape[0] if x.dim() else 0  # what doesn't fit is refused later
    single = isinstance(batch, int) and batch == 1
    if isinstance(batch, int) and batch == 0:
        return "unfold"  # the one that doesn't make pieces of the batch
    if torch.compiler.is_compiling() or is_tracing() or not isinstance(batch, int):
        # A group count is a constant of the graph, so folding the batch into it would fix the batch.
        return "groups" if single else "unfold"
    if x.is_meta or observed():
        return recompute.by_rule(operands)
    choices = choice.current()
    if choices.cpu or _is_gpu(x):
        return _measured(choices, operands)
    if len(choices) and (known := choices.known(key(operands))):
        return known  # by `tune`
    return "native"


def _is_gpu(x: Tensor) -> bool:
    """Whether it is on a device for which there is no rule worth the name."""
    return not x.is_cpu and x.device.type in ("cuda", "mps", "xpu")


def _measured(choices: Choices, operands: Operands) -> str:
    """The fastest strategy. If nothing may be measured, the one that is known already, else the rule's."""
    x = operands.x
    mode = choice.mode()
    # A fake tensor takes no time.
    if mode == "off" or engines.deterministic() or type(x) not in (Tensor, nn.Parameter):
        return "native"
    operands = operands._replace(geometry=fitting.numbered(operands.geometry))
    shape = key(operands)
    if known := choices.known(shape):
        return known
    fitting.check(operands)  # else every strategy would be found to fail
    # A strategy that was read from the file but never ran here isn't compiled yet, and can't be while a graph is
    # captured.
    if engines.capturing(x):
        return "native"
    if mode == "read-only":
        return choices.read(shape) or "native"
    return choices.choose(shape, trials(operands), "native")


# Unfolded inputs of more bytes aren't tried: the rest of the model would lack the memory.
_UNFOLDED = 512 * 2**20


def trials(operands: Operands) -> dict[str, Callable[[], None]]:
    """The functions to time to find the fastest strategy: one for each that can serve a call like this one.

    In training, strategies that keep every image's kernel are tried where those are small. Mixing feature maps takes
    g times the work, and is tried on GPUs, where the maps are small beside the kernels (`docs/kernels.md`).
    """
    x, weight, bias, mixing, geometry, _ = operands
    training = needs_backward(x, weight, bias, *mixing)
    if not _is_gpu(x):
        names = ["native", "tiled", "groups", "unfold"]
    else:
        names = list(engines.ENGINES)
        if triton.why_not(operands, training=training) is not None:
            names = [name for name in names if name not in triton.TILES]
        if weight.shape[2:].numel() * x.numel() * x.element_size() > _UNFOLDED:
            names.remove("recompute_unfold")
        if training and kernels_are_small(x, weight, mixing):
            names.append(recompute.by_rule(operands))
        if mixing.factors is None and _maps_are_small(operands):
            names.append("features")
    tensors = (x, weight, bias, *mixing)
    return {name: trial(partial(_run_on, name, geometry), tensors) for name in names}


def _run_on(
    name: str, geometry: Geometry, x: Tensor, weight: Tensor, bias: Tensor | None, *mixing: Tensor | None
) -> Tensor:
    return run(name, Operands(x, weight, bias, Mixing(*mixing), geometry))


def _maps_are_small(operands: Operands) -> bool:
    """Whether an image's outputs, of all experts, take no more memory than its kernel."""
    x, weight, _, mixing, geometry, _ = number_the_padding(operands)
    pixels = math.prod(size_of_output(x.shape[2:], weight.shape[2:], geometry))
    return mixing.g * pixels <= weight[0].numel()
