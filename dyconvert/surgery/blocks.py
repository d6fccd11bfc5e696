"""Finds the convs, the stems and the blocks of a model; nothing else."""

from collections.abc import Sequence

import torch
from torch import nn

from dyconvert.errors import ModelError
from dyconvert.names import holds
from dyconvert.nn import DynamicConv
from dyconvert.surgery.adapters import is_conv
from dyconvert.surgery.observe import Observation
from dyconvert.torch_internals.compiling import ORIGINAL, is_compiled
from dyconvert.torch_internals.modules import is_lazy


def check_convertible(model: nn.Module) -> None:
    """Refuse what can't be converted as a whole.

    Raises:
        ModelError: not a module, wrapped, compiled, scripted, lazy, already converted, or without convs.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"A torch.nn.Module is needed, not {type(model).__name__}. Pass the model itself.")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ModelError(f"The model is wrapped in {type(model).__name__}. Convert model.module, and wrap the result.")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("The model is scripted, its Python is gone. Convert it before torch.jit.script.")
    if is_compiled(model):
        raise ModelError(f"The model is compiled. Convert model.{ORIGINAL}, and compile the result.")
    convs = 0
    for name, module in model.named_modules():
        if isinstance(module, DynamicConv):
            raise ModelError(
                f"The model is already converted: {name or 'it'} is a {type(module).__name__}. "
                "Start from the static model."
            )
        if is_lazy(module):
            raise ModelError(
                f"{name or 'The model'} is lazy and has no weights yet. Run a batch through the model first."
            )
        convs += is_conv(module)
    if not convs:
        raise ModelError(
            f"{type(model).__name__} has no convs (Conv1d, Conv2d, Conv3d), so there is nothing to convert."
        )


def find_stems(convs: dict[str, nn.Module], observed: Observation | None) -> set[str]:
    """The convs that read the image: the first to be called, and others that read as few channels.

    A model whose input has more than four channels reads feature maps, and has no stem.
    """
    if observed is None:
        first = next(iter(convs.values()))
        channels = first.in_channels
        order = list(convs)
    else:
        channels = observed.image_channels or 0
        order = [name for name in observed.calls if name in convs]
    if not order or not 1 <= channels <= 4:
        return set()
    return {order[0]} | {name for name in order if convs[name].in_channels == channels}


def _is_container(module: nn.Module) -> bool:
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return True
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def innermost_blocks(model: nn.Module, names: Sequence[str]) -> dict[str, list[str]]:
    """Each block's name, and those of `names` that stand in it."""
    blocks = candidates(model, names)
    return {
        name: convs
        for name, convs in blocks.items()
        if not any(other != name and holds(name, other) for other in blocks)
    }


def candidates(model: nn.Module, names: Sequence[str]) -> dict[str, list[str]]:
    """The modules that hold at least two of `names`, and are no containers."""
    inside: dict[str, list[str]] = {}
    for name in names:
        parent = name
        while parent:
            parent = parent.rpartition(".")[0]
            inside.setdefault(parent, []).append(name)
    return {
        parent: convs
        for parent, convs in inside.items()
        if len(convs) >= 2 and not _is_container(model.get_submodule(parent))
    }
