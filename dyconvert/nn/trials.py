"""Trials for measured choice: one dynamic conv by one strategy, in the mode of the call."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dyconvert.nn import tiles
from dyconvert.nn.measured_choices import Key
from dyconvert.nn.operands import Operands

is_tracing = torch.jit.is_tracing  # type: ignore[attr-defined]  # torch documents it, and doesn't export it


def needs_backward(*tensors: Tensor | None) -> bool:
    """Whether a backward through a result of these tensors may follow."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def key(operands: Operands, training: bool | None = None) -> Key:
    """The key by which :class:`~dyconvert.nn.measured_choices.Choices` are looked up.

    Args:
        training: whether a backward may follow; None: as the tensors say.
    """
    x, weight, bias, mixing, geometry, _ = operands
    if training is None:
        training = needs_backward(x, weight, bias, *mixing)
    padding = geometry.padding if isinstance(geometry.padding, str) else tuple(geometry.padding)
    return Key(
        tuple(x.shape),
        tuple(weight.shape),
        tuple(mixing.coefficients.shape),
        tuple(geometry.stride),
        padding,
        tuple(geometry.dilation),
        geometry.groups,
        x.dtype,
        weight.dtype,
        x.device,
        tiles.is_channels_last(x),
        tiles.is_channels_last(weight),
        bias is not None,
        training,
        torch.get_num_threads() if x.is_cpu else 0,
        _precision() if x.is_cuda else "",
        mixing.factors is not None,
    )


def _precision() -> str:
    """The precision of float32 on a GPU, and whether cuDNN measures its fastest algorithm."""
    backends: Any = torch.backends
    names = [backends.cudnn.conv.fp32_precision, backends.cuda.matmul.fp32_precision]
    return "/".join(names) + (" benchmark" if backends.cudnn.benchmark else "")


def trial(run: Callable[..., Tensor], tensors: Sequence[Tensor | None]) -> Callable[[], None]:
    """A call of `run` on tensors of its own, with a backward where one through `tensors` may follow.

    Nothing of it is seen by what the caller is in the middle of: autograd's graph, the hooks by which activation
    checkpointing counts what is saved, and autocast, which has changed the tensors already.
    """
    leaves = [t if t is None else t.detach().requires_grad_(needs_backward(t)) for t in tensors]
    differentiated = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    device = next(leaf.device.type for leaf in leaves if leaf is not None)
    grad: list[Tensor] = []

    def call() -> None:
        with torch.autograd.graph.saved_tensors_hooks(_itself, _itself), torch.autocast(device, enabled=False):
            out = run(*leaves)
            if differentiated:
                if not grad:
                    grad.append(torch.ones_like(out))
                torch.autograd.grad(out, differentiated, grad)

    return call


def _itself(tensor: Tensor) -> Tensor:
    return tensor
