"""The check that a conversion ends with: the result computes what the original does."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dyconvert.copying import clear_hooks, sharing_copy
from dyconvert.differences import verify
from dyconvert.errors import ModelError
from dyconvert.nn import DynamicConv
from dyconvert.randomness import kept_random_state, random_state, set_random_state
from dyconvert.surgery.hooks import is_hooked

# How far rounding takes the outputs of a deep network, relative to the largest: the same sums in another order, and
# Winograd's filtering. Smaller dtypes round more.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}


def check_result(original: nn.Module, converted: nn.Module, example: Any) -> None:
    """Refuse a conversion that doesn't compute what the original does.

    Raises:
        ModelError: it doesn't.
    """
    with kept_random_state(), _kept_parameters(original), _kept_parameters(converted):
        state = random_state()
        first, second = _without_hooks(original), _without_hooks(converted)
        try:
            differences = verify(first, second, example)
        except ModelError:
            # Its hooks may feed its decoder.
            first, second = sharing_copy(original), sharing_copy(converted)
            try:
                differences = verify(first, second, example)
            except ModelError as error:
                raise ModelError(f"{error} check=False converts without running the result.") from error
        dtypes = [p.dtype for p in original.parameters()]
        if differences.relative <= max(TOLERANCE.get(dtype, 1e-3) for dtype in dtypes):
            return
        # A model that draws random numbers by itself, or sums in another order each time, differs from itself.
        set_random_state(state)
        if verify(first, first, example).relative >= differences.relative / 10:
            return
    raise ModelError(
        f"The converted {type(original).__name__} doesn't compute what the original does: {differences}. Nothing was "
        "converted. Leave parts of it out (exclude=...), give every conv its own predictor (scope='layer'), and "
        "please report it."
    )


def _without_hooks(model: nn.Module) -> nn.Module:
    """The model itself, or where it has hooks of the user's, which are not to see this run, a copy.

    A copy may be another model than the one that it was made of: code that knows modules by `id`, for example.
    """
    if not any(map(is_hooked, model.modules())):
        return model
    copy = sharing_copy(model)
    clear_hooks(copy)
    return copy


@contextmanager
def _kept_parameters(model: nn.Module) -> Iterator[None]:
    """Put back what a forward writes into parameters; none writes into banks, or their convs would be static.

    Nor into predictors, which are parts of dynamic convs: with the banks they are most of a converted model.
    """
    ours = {id(p) for m in model.modules() if isinstance(m, DynamicConv) for p in m.parameters()}
    parameters = [p for p in model.parameters() if id(p) not in ours]
    values = [p.detach().clone() for p in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, values, strict=True):
                if not torch.equal(parameter, value):
                    parameter.data.copy_(value)
