"""Multiply-adds and parameters."""

from typing import Any

import torch
from torch import Tensor, nn

from dyconvert.arguments import as_arguments
from dyconvert.copying import clear_hooks, on_meta, skeleton
from dyconvert.torch_internals.trees import tree_map_only
from dyconvert.torch_internals.watching import count_totals_only


def macs(model: nn.Module, example: Any) -> int:
    """Multiply-adds of one forward in eval mode, as the papers count them.

    `torch.utils.flop_counter` counts two operations per multiply-add; this is half of that. The model runs on
    the meta device where it can, else for real.

    Args:
        example: an input tensor, or the tuple of the forward's arguments; its batch size is what is counted.
    """
    arguments = as_arguments(example)
    try:
        return _counted(on_meta(model), tree_map_only(Tensor, lambda t: t.to("meta"), arguments))
    except Exception:
        if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
            raise  # it can't run for real either, and would say something misleading
    return _counted(skeleton(model, lambda t: t), arguments)


def _counted(runner: nn.Module, arguments: tuple[Any, ...]) -> int:
    # It imports triton, which takes a quarter of a second.
    from torch.utils.flop_counter import FlopCounterMode

    clear_hooks(runner.eval())
    counter = count_totals_only(FlopCounterMode(display=False))
    with torch.no_grad(), counter:
        runner(*arguments)
    return int(counter.get_total_flops()) // 2


def parameters(model: nn.Module) -> int:
    """Number of parameters, shared ones counted once."""
    return sum(p.numel() for p in model.parameters())


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, shared ones counted once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())
