"""Watching a converted model run over data: its coefficients, whose predictor they are, and how to call it."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dyconvert.arguments import check_iterable
from dyconvert.errors import ModelError
from dyconvert.names import joined
from dyconvert.nn import CoefficientPredictor, DynamicConv
from dyconvert.nn.handing import handed, sharing_blocks
from dyconvert.nn.mixture import Mixture
from dyconvert.torch_internals.trees import tree_map_only


def watch_mixtures(model: nn.Module, see: Callable[[str, Mixture], None]) -> None:
    """Have `see(conv's name, mixture)` called at every call of every dynamic conv.

    The hooks stay: pass a copy of the model.
    """

    def watch(name: str, conv: DynamicConv) -> None:
        if conv.coefficient_predictor is not None:
            conv.coefficient_predictor.register_forward_hook(lambda _, args, output: see(name, output[0]))
        else:
            conv.register_forward_pre_hook(lambda conv, args: see(name, handed(conv)))

    for name, module in model.named_modules():
        if isinstance(module, DynamicConv):
            watch(name, module)


def predictor_of(model: nn.Module, conv: str) -> CoefficientPredictor:
    """The conv's own predictor, or that of the block that hands coefficients to it."""
    own = model.get_submodule(conv).coefficient_predictor
    return own if own is not None else model.get_submodule(block_of(model, conv)[1]).block_predictor


def block_of(model: nn.Module, conv: str) -> tuple[str, str]:
    """The block that hands coefficients to a conv, and the conv that holds the block's predictor, by name.

    Raises:
        ModelError: there is none.
    """
    for name, _, handing in sharing_blocks(model):
        if any(joined(name, each) == conv for each in handing.convs):
            return name, joined(name, handing.convs[0])
    raise ModelError(f"No predictor for {conv} is in this model. Pass the whole converted model, not a part of it.")


def run_over(model: nn.Module, batches: Iterable[Any]) -> None:
    """Run the model on each batch, one at a time, without gradients; hooks collect the results.

    Args:
        batches: as :func:`arguments_of` takes them.

    Raises:
        ModelError: there is no batch, or the model rejects one.
    """
    check_iterable(batches)
    number = -1
    with torch.no_grad():
        for number, batch in enumerate(batches):
            args, kwargs = arguments_of(model, batch)
            try:
                model(*args, **kwargs)
            except Exception as error:
                raise ModelError(
                    f"{type(model).__name__} rejects batch {number} of the data: {type(error).__name__}: {error} "
                    "A batch is the input, (input, ...), or a dict of the forward's arguments."
                ) from error
    if number < 0:
        raise ModelError("The data holds no batch. An iterator that was used up gives no more: pass the loader itself.")


def arguments_of(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What to call the model with for a batch of data, on the model's device and in its floating dtype.

    Args:
        batch: a tensor, a tuple or list whose first item is the input, or a dict of the forward's arguments (of a
            dict without any, the first value is the input).

    Raises:
        ModelError: the batch is empty.
    """
    first = next(model.parameters())

    def moved(value: Any) -> Any:
        return tree_map_only(
            Tensor,
            lambda t: t.to(first.device, first.dtype) if t.is_floating_point() else t.to(first.device),
            value,
        )

    if isinstance(batch, Mapping):
        parameters = inspect.signature(model.forward).parameters
        if known := {key: value for key, value in batch.items() if key in parameters}:
            return (), moved(known)
        batch = list(batch.values())
    if isinstance(batch, (tuple, list)):
        if not batch:
            raise ModelError("A batch of the data is empty. A batch is the input, or (input, ...).")
        batch = batch[0]
    return (moved(batch),), {}
