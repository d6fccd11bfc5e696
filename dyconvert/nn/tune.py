"""tune(model, example): the fastest strategy for every dynamic conv, measured once on this machine."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dyconvert.arguments import as_arguments
from dyconvert.errors import ModelError
from dyconvert.nn.convs import DynamicConv, DynamicConv1d, DynamicConv2d, DynamicConv3d
from dyconvert.nn.dispatch import STRATEGIES, Geometry, Key, dynamic_conv, force, key, tuned

# In a plain loop the strategies that can win; mixing feature maps takes g times the work.
_CANDIDATES = tuple(name for name in STRATEGIES if name != "features")


def tune(model: nn.Module, example: Any, *, repeats: int = 5) -> dict[str, str]:
    """Measure the strategies on every dynamic conv of `model`, and use the fastest from now on.

    What is found holds in this process, for convs of the same shapes, batch, dtype, device, mode (training or
    inference) and number of threads as here; others are left to the rules.

    Args:
        model: a converted model, in the mode to tune for: in training mode, forward and backward are measured.
        example: an input or the tuple of the forward's arguments, of the batch size to tune for.
        repeats: measurements of each strategy, in turns, of which the median counts.

    Returns:
        each dynamic conv's name and its strategy; transposed ones have only one, and are left out

    Raises:
        ModelError: the model has no dynamic conv.
    """
    # A transposed conv has one way to be computed, and nothing to choose.
    kinds = (DynamicConv1d, DynamicConv2d, DynamicConv3d)
    convs = {name for name, module in model.named_modules() if isinstance(module, kinds)}
    if not convs:
        raise ModelError(f"{type(model).__name__} has no dynamic conv to tune. Pass what dyconvert.convert returned.")
    calls = _observe(model, convs, as_arguments(example))
    chosen = {}
    for name, (tensors, geometry) in calls.items():
        with torch.set_grad_enabled(model.training):
            found: Key = key(*tensors, geometry)
            if found not in tuned:
                tuned[found] = _fastest(lambda t=tensors, k=geometry: _run(t, k), tensors[0].device, repeats)
            chosen[name] = tuned[found]
    return chosen


def _observe(
    model: nn.Module, convs: set[str], arguments: tuple[Any, ...]
) -> dict[str, tuple[list[Tensor | None], Geometry]]:
    """What each of the `convs`, by name, is called with, from one run."""
    calls: dict[str, tuple[list[Tensor | None], Geometry]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(conv: DynamicConv, given: tuple[Tensor, ...], options: dict[str, Tensor]) -> None:
            x = given[0]
            coefficients = given[1] if len(given) > 1 else options.get("coefficients")
            if coefficients is None:
                coefficients = conv.coefficient_predictor(x)[0]
            x, padding = conv.padded(x)
            needs = model.training
            tensors = [x.detach().requires_grad_(needs), conv.weight, conv.bias]
            tensors.append(coefficients.detach().requires_grad_(needs))
            calls[name] = tensors, Geometry(conv.stride, padding, conv.dilation, conv.groups)

        return hook

    hooks = [
        module.register_forward_pre_hook(note(name), with_kwargs=True)
        for name, module in model.named_modules()
        if name in convs
    ]
    try:
        with torch.no_grad():
            model(*arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _run(tensors: list[Tensor | None], geometry: Geometry) -> None:
    out = dynamic_conv(*tensors, *geometry)
    if out.requires_grad:
        wanted = [t for t in tensors if t is not None and t.requires_grad]
        torch.autograd.grad(out.sum(), wanted)


def _fastest(run: Callable[[], None], device: torch.device, repeats: int) -> str:
    times: dict[str, list[float]] = {name: [] for name in _CANDIDATES}
    for turn in range(repeats + 1):
        for name, found in times.items():
            with force(name):
                start = time.perf_counter()
                run()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if turn:  # the first is to warm up
                    found.append(time.perf_counter() - start)
    return min(times, key=lambda name: statistics.median(times[name]))
