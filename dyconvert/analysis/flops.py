"""Multiply-adds and parameters."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from dyconvert.surgery.observe import clear_hooks, skeleton


def macs(model: nn.Module, example: Any) -> int:
    """Multiply-adds of one forward in eval mode, as the papers count them.

    `torch.utils.flop_counter` counts two operations per multiply-add; this is half of that. The model runs on
    the meta device where it can, else for real.

    Args:
        example: an input tensor, or the tuple of the forward's arguments; its batch size is what is counted.
    """
    arguments = example if isinstance(example, tuple) else (example,)
    on_meta = any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    for device in ("meta",) if on_meta else ("meta", None):
        runner = skeleton(model, (lambda t: t.to("meta")) if device else (lambda t: t)).eval()
        clear_hooks(runner)
        inputs = tree_map_only(Tensor, lambda t: t.to(device), arguments) if device else arguments  # noqa: B023
        counter = FlopCounterMode(display=False)
        try:
            with torch.no_grad(), counter:
                runner(*inputs)
        except Exception:
            if device is None or on_meta:
                raise
            continue
        return counter.get_total_flops() // 2
    raise AssertionError("unreachable: the real run returns or raises")


def parameters(model: nn.Module) -> int:
    """Number of parameters, shared ones counted once."""
    return sum(p.numel() for p in model.parameters())
