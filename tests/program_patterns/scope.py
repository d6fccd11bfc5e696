"""What the pieces' code refers to: libraries, and classes as users write them."""

import functools
import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint


class Sign(torch.autograd.Function):
    """A straight-through estimator."""

    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Reverse(torch.autograd.Function):
    """Gradient reversal."""

    @staticmethod
    def forward(ctx, x, by):
        ctx.by = by
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -ctx.by * gradient, None


class Scaled(nn.Conv2d):
    """A conv with a forward of its own."""

    def forward(self, x):
        return super().forward(x) * 0.5


class Named(nn.Conv2d):
    """A conv of a class of the user's own, which changes nothing."""


class Inner(nn.Module):
    """A block in a block."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return x + self.second(self.first(x).tanh())


class Equalised(nn.Module):
    """Uses a conv's weight without calling it."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.conv.weight * 0.3)


def tiled(self: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A `_conv_forward` as diffusers' tiling patches it in."""
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)


def around(conv: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A forward as accelerate's hooks put it around a module's own."""
    return conv._old_forward(*args, **kwargs) * 0.5


def logged(function: Any) -> Any:
    """A decorator that changes what the forward returns."""

    @functools.wraps(function)
    def wrapped(self, *args, **kwargs):
        return function(self, *args, **kwargs) * 1.5

    return wrapped


# What the pieces' code refers to.
SCOPE: dict[str, Any] = {
    "Tensor": Tensor,
    "F": F,
    "nn": nn,
    "np": np,
    "torch": torch,
    "random": random,
    "functools": functools,
    "checkpoint": checkpoint,
    "prune": prune,
    "parametrizations": parametrizations,
    "Sign": Sign,
    "Reverse": Reverse,
    "Scaled": Scaled,
    "Named": Named,
    "Inner": Inner,
    "Equalised": Equalised,
    "tiled": tiled,
    "around": around,
    "logged": logged,
}
