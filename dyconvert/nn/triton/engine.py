"""The engine of Triton kernels: which convs it computes, and the strategies that replace it when Triton fails."""

import functools
import math

import torch
from torch import Tensor

from dyconvert.errors import brief
from dyconvert.nn import choice, recompute
from dyconvert.nn.measured_choices import out_of_memory
from dyconvert.nn.operands import Gradients, Needs, Operands
from dyconvert.nn.triton import launch
from dyconvert.nn.triton.tile import TILES as TILES
from dyconvert.nn.triton.tile import Tile as Tile

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Experts whose part of the bank's gradient a program holds in registers.
_EXPERTS = 16


@functools.cache
def _absent() -> str | None:
    """Why there is no Triton here, or None."""
    try:
        import triton

        if not interpreted():
            triton.runtime.driver.active.get_current_target()
    except ImportError as error:
        return f"Triton can't be imported ({error})"
    except Exception as error:
        return f"Triton finds no GPU ({brief(error)})"
    return None


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on a CPU: how they are tested without a GPU."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def why_not(operands: Operands, *, training: bool = False) -> str | None:
    """Why the kernels can't compute a conv, or None; padding may be "same" or "valid".

    Args:
        training: whether a backward may follow.
    """
    x, weight, _, mixing, geometry, _ = operands
    if (absent := _absent()) is not None:
        return absent
    if not (x.is_cuda or (x.is_cpu and interpreted())):
        return f"it is on the device {x.device.type}"
    if x.dim() != 4:
        return "it isn't 2-d"
    for dtype in (x.dtype, weight.dtype, mixing.coefficients.dtype):
        if dtype not in _DTYPES:
            return f"its dtype is {dtype}"
    if mixing.factors is not None:
        return "the elements of its kernels have factors"
    if training and mixing.g > _EXPERTS:
        return f"it has more than {_EXPERTS} experts"
    # Offsets within an image and within the bank have 32 bits; launch grids have 16 for images, and for groups.
    if (
        max(x[0].numel() if len(x) else 0, weight.numel()) >= 2**31
        or x.shape[0] >= 2**16
        or geometry.groups * math.prod(geometry.stride) >= 2**16
    ):
        return "it is too large"
    if x.numel() == 0 or x.shape[1] != weight.shape[1] * geometry.groups:
        return "torch says best what doesn't fit"
    return None


def forward(operands: Operands, how: Tile) -> Tensor:
    """A dynamic conv without autograd and without factors."""
    try:
        return launch.forward(operands, how)
    except Exception as error:
        _give_up(error, how)
    return recompute.forward(operands, recompute.by_rule(operands))


def backward(grad: Tensor, operands: Operands, needs: Needs, how: Tile) -> Gradients:
    """Those gradients that are needed; without autograd and without factors."""
    try:
        return launch.backward(grad, operands, needs, how)
    except Exception as error:
        _give_up(error, how)
    return recompute.backward(grad, operands, needs, recompute.by_rule(operands))


def _give_up(error: Exception, tile: Tile) -> None:
    """Leave the tile out from now on, or all tiles if it isn't the tile's fault. Raise an error that isn't Triton's."""
    if out_of_memory(error):
        raise error
    if type(error).__name__ == "OutOfResources":  # the tile is too large for this GPU's shared memory: others aren't
        choice.current().fail([tile.name], error, warn=False)
    else:
        choice.current().fail(list(TILES), error)
