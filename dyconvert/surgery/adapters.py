"""Which convs can become dynamic, and what each of them convolves with and pads by.

A plain `nn.Conv2d` says it itself. A subclass with a forward of its own may do anything, so it needs an entry
here, or is skipped by name.
"""

import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dyconvert.nn.padding import TF_SAME
from dyconvert.surgery.hooks import uses_weights
from dyconvert.torch_internals.modules import (
    CALL,
    CONV_FORWARD,
    ConvNd,
    accumulation_hooks,
    conv_forward,
    gradient_hooks,
)

_PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PLAIN_FORWARDS = {cls.forward for cls in _PLAIN}
_PLAIN_CONV_FORWARDS = {conv_forward(cls) for cls in _PLAIN}

# timm's convs, known by name: timm need not be installed.
_STANDARDISED = ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame")
_ADAPTED = ("Conv2dSame", *_STANDARDISED)


def _timm_name(conv: nn.Module) -> str | None:
    return type(conv).__name__ if type(conv).__module__.startswith("timm.layers.") else None


def is_conv(module: nn.Module) -> bool:
    """Whether the module counts as a conv: every conv is converted, or skipped with a reason."""
    return isinstance(module, ConvNd) or _is_deformable(module)


def _is_deformable(module: nn.Module) -> bool:
    # A model can have one only where torchvision is imported already, and importing it takes half a second.
    ops = sys.modules.get("torchvision.ops")
    return ops is not None and isinstance(module, ops.DeformConv2d)


def is_standardised(conv: nn.Module) -> bool:
    """Whether the conv standardises its weight at each call."""
    return _timm_name(conv) in _STANDARDISED


def unsupported(conv: nn.Module) -> str | None:
    """Why this conv can't become dynamic, or None if it can."""
    if _is_deformable(conv):
        return "deformable conv: its offsets say where it samples"
    if parametrize.is_parametrized(conv):
        names = ", ".join(type(p[0]).__name__.lstrip("_") for p in conv.parametrizations.values())
        return f"its weight is parametrized ({names}); parametrize.remove_parametrizations makes it plain"
    if not isinstance(conv.weight, nn.Parameter):
        return "its weight is computed by a hook (weight_norm, spectral_norm, pruning); remove that first"
    for patched in ("forward", CONV_FORWARD, "__call__"):
        if patched in vars(conv):
            return f"its {patched} was replaced on this instance"
    if uses_weights(conv):
        return "a hook on it uses its weight"
    for own in ("__call__", CALL, "__getattr__", "__getattribute__"):
        if getattr(type(conv), own) is not getattr(nn.Module, own, getattr(object, own, None)):
            return f"{type(conv).__name__} has a {own} of its own"
    parameters = {"weight": conv.weight, "bias": conv.bias}
    for kind, parameter in parameters.items():
        if parameter is not None and (gradient_hooks(parameter) or accumulation_hooks(parameter)):
            return f"there are hooks on its {kind}"
        if parameter is not None and not parameter.is_floating_point():
            return f"its {kind} is {str(parameter.dtype).removeprefix('torch.')}"
        if parameter is not None and type(parameter) not in (nn.Parameter, Tensor):
            return f"its {kind} is a {type(parameter).__name__}"
    first, second = conv.out_channels, conv.in_channels
    if conv.transposed:
        first, second = second, first
    shape = (first, second // conv.groups, *conv.kernel_size)
    if tuple(conv.weight.shape) != shape:
        return f"its weight is {list(conv.weight.shape)}, not {list(shape)} as its attributes say"
    if conv.bias is not None and (conv.bias.shape != (conv.out_channels,) or conv.bias.dtype != conv.weight.dtype):
        return f"its bias is {list(conv.bias.shape)}, {conv.bias.dtype}, which doesn't fit its weight"
    if _timm_name(conv) in _ADAPTED:
        return None
    if type(conv).forward not in _PLAIN_FORWARDS or conv_forward(type(conv)) not in _PLAIN_CONV_FORWARDS:
        return f"{type(conv).__name__} has a forward of its own"
    return None


def static_weight(conv: nn.Module) -> Tensor:
    """The kernel that the conv convolves with, `[C_out, C_in / groups, *kernel]` (transposed: C_in, C_out first).

    Where the conv standardises its weight at each call (Qiao et al. 2019, arXiv:1903.10520; with a gain,
    Brock et al. 2021, arXiv:2101.08692), the standardised weight is the static kernel.
    """
    weight = conv.weight.detach()
    if not is_standardised(conv):
        return weight
    gain = (conv.gain.detach() * conv.scale).flatten() if hasattr(conv, "gain") else None
    with torch.no_grad():
        flat = weight.reshape(1, conv.out_channels, -1)
        return F.batch_norm(flat, None, None, weight=gain, training=True, momentum=0.0, eps=conv.eps).view_as(weight)


def static_padding(conv: nn.Module) -> Sequence[int] | str:
    """What the conv pads by: numbers, "same", "valid", or TensorFlow's "same", which depends on the input."""
    if _timm_name(conv) == "Conv2dSame" or getattr(conv, "same_pad", False):
        return TF_SAME
    return conv.padding
