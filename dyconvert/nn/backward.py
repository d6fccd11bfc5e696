"""The autograd function around every engine: it keeps no kernel of any image."""

from typing import Any

import torch
from torch import Tensor

from dyconvert.nn import strategies
from dyconvert.nn.engines import Engine
from dyconvert.nn.mixture import Mixing
from dyconvert.nn.operands import Geometry, Needs, Operands


class MixedAgainConv(torch.autograd.Function):
    """A dynamic conv that saves its arguments for backward, and mixes the kernels again there.

    Where the backward is itself to be differentiated, it is computed by a plain strategy instead.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        coefficients: Tensor,
        factors: Tensor | None,
        geometry: Geometry,
        engine: Engine,
        how: Any,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, coefficients, factors)
        ctx.run_by = geometry, engine, how
        return engine.forward(Operands(x, weight, None, Mixing(coefficients, factors), geometry), how)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        geometry, engine, how = ctx.run_by
        needs = Needs(*ctx.needs_input_grad[:4])
        x, weight, coefficients, factors = ctx.saved_tensors
        operands = Operands(x, weight, None, Mixing(coefficients, factors), geometry)
        if torch.is_grad_enabled():
            return (*_differentiable(grad, operands, needs), None, None, None)
        return (*engine.backward(grad, operands, needs, how), None, None, None)


def _differentiable(grad: Tensor, operands: Operands, needs: Needs) -> list[Tensor | None]:
    inputs = (operands.x, operands.weight, *operands.mixing)
    differentiated = [tensor for tensor, needed in zip(inputs, needs, strict=True) if needed]
    gradients = iter(torch.autograd.grad(strategies.groups(operands), differentiated, grad, create_graph=True))
    return [next(gradients) if needed else None for needed in needs]
