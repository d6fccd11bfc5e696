"""What people write in a forward, as pieces of code that the property test puts together into blocks.

A piece has what `__init__` runs, a line `---`, and what `forward` runs: from `x`, `[N, 4, 6, 6]`, to `x` of that shape.
`@` becomes a number, so that pieces don't meet each other's attributes; `CONV` becomes a conv from 4 to 4 channels that
keeps the size.
"""

import functools
import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

CHANNELS, SIDE = 4, 6


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

PLAIN = {
    "conv": """
self.c@ = CONV
---
x = self.c@(x).tanh()
""",
    "conv, norm, activation": """
self.c@ = CONV
self.n@ = nn.BatchNorm2d(4)
---
x = self.n@(self.c@(x)).relu()
""",
    "residual": """
self.c@ = CONV
self.d@ = CONV
---
x = x + self.d@(self.c@(x).sigmoid())
""",
    "branches": """
self.c@ = CONV
self.d@ = CONV
---
x = torch.cat([self.c@(x), self.d@(x)], 1)[:, ::2]
""",
    "squeeze and excite": """
self.c@ = CONV
self.e@ = nn.Conv2d(4, 4, 1)
---
y = self.c@(x)
x = y * self.e@(y.mean((2, 3), keepdim=True)).sigmoid()
""",
    "transposed": """
self.c@ = nn.ConvTranspose2d(4, 4, 3, padding=1)
---
x = self.c@(x, output_size=x.shape[-2:])
""",
    "one dimension": """
self.c@ = nn.Conv1d(4, 4, 3, padding=1)
---
x = self.c@(x.flatten(2)).view_as(x).tanh()
""",
    "three dimensions": """
self.c@ = nn.Conv3d(4, 4, (1, 3, 3), padding=(0, 1, 1))
---
x = self.c@(x.unsqueeze(2)).squeeze(2)
""",
    "inner block": """
self.b@ = Inner()
---
x = self.b@(x)
""",
}

BRANCHES = {
    "isinstance": """
self.c@ = CONV
---
x = self.c@(x)
x = F.relu(x) if isinstance(x, Tensor) else x.neg()
""",
    "hasattr": """
self.c@ = CONV
---
x = self.c@(x.tensors if hasattr(x, "tensors") else x.tanh())
""",
    "type(x) is": """
self.c@ = CONV
---
x = self.c@(x)
x = x.abs() if type(x) is Tensor else x
""",
    "dict by shape": """
self.c@ = CONV
---
x = self.c@(x) * {6: 3.0, 7: 2.0}.get(x.shape[-1], 1.0)
""",
    "shape in a set": """
self.c@ = CONV
---
x = self.c@(x) if x.shape[1] in {4, 8} else x
""",
    "match": """
self.c@ = CONV
---
match x.dim():
    case 4:
        x = self.c@(x).sin()
    case _:
        x = self.c@(x)
""",
    "try": """
self.c@ = CONV
---
try:
    x = self.c@(x.tensors)
except AttributeError:
    x = self.c@(x).sin()
""",
    "a part's own mode": """
self.c@ = CONV
self.d@ = nn.Dropout(0.3)
---
x = self.d@(self.c@(x)) * (1 if self.d@.training else 2)
""",
    "own mode": """
self.c@ = CONV
---
x = self.c@(x) * (2 if self.training else 1)
""",
    "is_grad_enabled": """
self.c@ = CONV
---
x = self.c@(x) * (0.5 if torch.is_grad_enabled() else 1.0)
""",
    "requires_grad": """
self.c@ = CONV
---
y = self.c@(x)
x = y * 1.5 if y.requires_grad else y
""",
    "length of the batch": """
self.c@ = CONV
---
x = self.c@(x)
x = x.sin() if len(x) > 1 else x
""",
    "a tensor's value": """
self.c@ = CONV
---
x = self.c@(x)
x = x if x.sum() > 0 else -x
""",
    "cache by shape": """
self.c@ = CONV
self.cache@ = {}
---
if x.shape[-1] not in self.cache@:
    self.cache@[x.shape[-1]] = torch.linspace(0, 1, x.shape[-1], dtype=x.dtype)
x = self.c@(x) + self.cache@[x.shape[-1]]
""",
    "isinstance of layers": """
self.layers@ = nn.ModuleList([CONV, nn.Tanh(), CONV])
---
for layer in self.layers@:
    x = layer(x) * 2 if isinstance(layer, nn.Conv2d) else layer(x)
""",
    "type of layers": """
self.layers@ = nn.ModuleList([CONV, nn.Tanh(), CONV])
---
for layer in self.layers@:
    x = layer(x) * 2 if type(layer) is nn.Conv2d else layer(x)
""",
    "name of layers' class": """
self.layers@ = nn.ModuleList([CONV, nn.Tanh(), CONV])
---
for layer in self.layers@:
    x = layer(x) * 2 if layer.__class__.__name__ == "Conv2d" else layer(x)
""",
    "conv's attributes": """
self.c@ = CONV
---
x = self.c@(x) / (self.c@.out_channels + self.c@.kernel_size[0])
""",
    "NumPy scalar": """
self.c@ = CONV
---
x = (x + self.c@(x)) / np.sqrt(2.0)
""",
    "keys that are no names": """
self.m@ = nn.ModuleDict({"in": CONV, "it's": CONV})
---
x = self.m@["it's"](self.m@["in"](x).tanh())
""",
}

CONTEXTS = {
    "no_grad": """
self.c@ = CONV
---
with torch.no_grad():
    y = self.c@(x)
x = x + y
""",
    "enable_grad": """
self.c@ = CONV
---
with torch.enable_grad():
    x = self.c@(x)
""",
    "set_grad_enabled": """
self.c@ = CONV
---
with torch.set_grad_enabled(not self.training):
    y = self.c@(x)
x = x + y
""",
    "detach": """
self.c@ = CONV
---
x = x + self.c@(x.detach())
""",
    "autocast island": """
self.c@ = CONV
self.register_buffer("w@", torch.linspace(0, 0.01, 144).view(-1, 1))
---
with torch.autocast("cpu", torch.bfloat16):
    y = torch.matmul(x.detach().float().flatten(1), self.w@.float())
x = self.c@(x) + y.to(x.dtype).view(-1, 1, 1, 1)
""",
    "checkpoint of a conv": """
self.c@ = CONV
---
x = x + checkpoint(self.c@, x, use_reentrant=False)
""",
    "checkpoint, reentrant": """
self.c@ = CONV
---
x = x + checkpoint(self.c@, x, use_reentrant=True)
""",
    "checkpoint of a function": """
self.c@ = CONV
self.d@ = CONV
---
def inner(y):
    return self.d@(self.c@(y).tanh())
x = checkpoint(inner, x, use_reentrant=False)
""",
    "checkpoint in training only": """
self.c@ = CONV
---
x = checkpoint(self.c@, x, use_reentrant=False) if self.training else self.c@(x)
""",
    "functional_call": """
self.c@ = CONV
---
x = torch.func.functional_call(self.c@, dict(self.c@.named_parameters()), (x,))
""",
    "vmap": """
self.c@ = nn.Conv2d(4, 4, 3, padding=1)
---
x = torch.func.vmap(lambda each: self.c@(each.unsqueeze(0)).squeeze(0))(x)
""",
    "hook on a map": """
self.c@ = CONV
---
x = self.c@(x)
if x.requires_grad:
    x.register_hook(lambda gradient: gradient * 2)
""",
    "gradient in the forward": """
self.c@ = CONV
---
with torch.enable_grad():
    z = x.detach().requires_grad_()
    gradient, = torch.autograd.grad(self.c@(z).square().sum(), z)
x = self.c@(x) + gradient
""",
    "saved on the CPU": """
self.c@ = CONV
---
with torch.autograd.graph.save_on_cpu():
    x = self.c@(x).tanh()
""",
}

IN_PLACE = {
    "alias": """
self.c@ = CONV
self.d@ = CONV
---
y = self.c@(x)
first = y
y += self.d@(x)
x = torch.cat([first, y], 1)[:, ::2]
""",
    "relu_": """
self.c@ = CONV
---
x = self.c@(x)
x.relu_()
""",
    "written to its input": """
self.c@ = CONV
---
x = x * 1.0
first = x
x += x.detach().tanh()
x = self.c@(x) + first
""",
    "assigned channels": """
self.c@ = CONV
---
y = x * 1.0
y[:, :2] = self.c@(x)[:, 2:]
x = y
""",
    "filled": """
self.c@ = CONV
---
y = torch.zeros_like(x)
y[:, :, 1:-1, 1:-1] = self.c@(x)[:, :, 1:-1, 1:-1]
x = x + y
""",
    "list changed": """
self.c@ = CONV
self.d@ = CONV
---
maps = [conv(x) for conv in (self.c@, self.d@)]
maps[0] += 1
maps.append(maps.pop(0))
x = maps[0] - maps[1]
""",
}

STATE = {
    "counter": """
self.c@ = CONV
self.register_buffer("n@", torch.zeros(()))
---
if self.training:
    self.n@ += 1
x = self.c@(x) * (1 + 0.1 * self.n@.clone())
""",
    "running average": """
self.c@ = CONV
self.register_buffer("avg@", torch.ones(()))
---
if self.training:
    self.avg@.mul_(0.9).add_(x.detach().mean() * 0.1)
x = self.c@(x) * self.avg@.clone()
""",
    "buffer set anew": """
self.c@ = CONV
self.register_buffer("avg@", torch.ones(()))
---
x = self.c@(x) * self.avg@
self.avg@ = 0.9 * self.avg@ + 0.1 * x.detach().mean()
""",
    "Python counter": """
self.c@ = CONV
self.k@ = 0
---
self.k@ += 1
x = self.c@(x) * (1 + 0.1 * (self.k@ % 3))
""",
    "list that grows": """
self.c@ = CONV
self.seen@ = []
---
x = self.c@(x)
self.seen@.append(x.detach().mean())
x = x + 0.1 * len(self.seen@)
""",
    "last map": """
self.c@ = CONV
self.last@ = None
---
y = self.c@(x)
x = y if self.last@ is None or self.last@.shape != y.shape else y + 0.1 * self.last@
self.last@ = y.detach()
""",
    "teacher that follows": """
self.c@ = CONV
self.t@ = CONV
self.t@.requires_grad_(False)
---
if self.training:
    with torch.no_grad():
        self.t@.weight.mul_(0.9).add_(0.1 * self.c@.weight)
x = self.c@(x) + self.t@(x.detach())
""",
}

RANDOM = {
    "functional dropout": """
self.c@ = CONV
---
x = F.dropout(self.c@(x), 0.3, self.training)
""",
    "torch's in eval too": """
self.c@ = CONV
---
x = self.c@(x) * torch.rand_like(x)
""",
    "NumPy's": """
self.c@ = CONV
---
x = x if self.training and np.random.rand() < 0.5 else x + self.c@(x)
""",
    "Python's": """
self.c@ = CONV
---
x = self.c@(x) * random.random()
""",
    "torch generator of its own": """
self.c@ = CONV
self.g@ = torch.Generator().manual_seed(3)
---
x = self.c@(x) * torch.rand(x.shape, generator=self.g@, dtype=x.dtype)
""",
    "Python generator of its own": """
self.c@ = CONV
self.g@ = random.Random(3)
---
x = self.c@(x) * self.g@.random()
""",
    "NumPy generator of its own": """
self.c@ = CONV
self.g@ = np.random.default_rng(3)
---
x = self.c@(x) * float(self.g@.random())
""",
    "layers dropped": """
self.layers@ = nn.ModuleList([CONV, CONV])
---
for layer in self.layers@:
    if self.training and torch.rand(()) < 0.5:
        continue
    x = layer(x).tanh()
""",
    "layers shuffled": """
self.c@ = CONV
self.d@ = CONV
---
convs = [self.c@, self.d@]
random.shuffle(convs)
x = convs[1](convs[0](x).tanh())
""",
    "crop in training": """
self.c@ = CONV
---
shift = int(torch.randint(0, 3, ())) if self.training else 0
x = self.c@(x.roll(shift, 3))
""",
}

BATCH = {
    "groups folded": """
self.c@ = nn.Conv2d(2, 2, 3, padding=1)
---
n, c, h, w = x.size()
x = self.c@(x.reshape(n * 2, -1, h, w)).reshape(n, c, h, w)
""",
    "windows": """
self.c@ = CONV
---
n = x.shape[0]
y = x.reshape(n, 4, 2, 3, 2, 3).permute(0, 2, 4, 1, 3, 5).reshape(-1, 4, 3, 3)
x = self.c@(y).reshape(n, 2, 2, 4, 3, 3).permute(0, 3, 1, 4, 2, 5).reshape(n, 4, 6, 6)
""",
    "time folded": """
self.c@ = CONV
---
n = x.shape[0]
y = x.unflatten(3, (2, 3)).permute(0, 3, 1, 2, 4).flatten(0, 1)
x = self.c@(y).unflatten(0, (n, 2)).permute(0, 2, 3, 1, 4).flatten(3)
""",
    "channels folded": """
self.c@ = nn.Conv2d(1, 1, 3, padding=1)
---
x = self.c@(x.flatten(0, 1).unsqueeze(1)).squeeze(1).view_as(x)
""",
    "pairs": """
self.c@ = CONV
---
y = self.c@(torch.cat([x, x.tanh()]))
x = y[: x.shape[0]] * y[x.shape[0] :]
""",
    "repeated": """
self.c@ = CONV
---
x = self.c@(x.repeat_interleave(2, 0))[::2]
""",
    "halves": """
self.c@ = CONV
self.d@ = CONV
---
half = x.shape[0] // 2
x = torch.cat([self.c@(x[:half]), self.d@(x[half:])])
""",
    "chunk": """
self.c@ = CONV
---
x = torch.cat([self.c@(each) for each in x.chunk(2)])
""",
    "reversed": """
self.c@ = CONV
---
x = self.c@(x.flip(0)).flip(0)
""",
    "rolled": """
self.c@ = CONV
---
x = self.c@(x.roll(1, 0)).roll(-1, 0)
""",
    "mixed": """
self.c@ = CONV
---
x = x + self.c@(x.flip(0))
""",
    "shuffled": """
self.c@ = CONV
---
order = torch.randperm(x.shape[0])
x = self.c@(x[order])[order.argsort()]
""",
    "shuffled in training": """
self.c@ = CONV
---
order = torch.randperm(x.shape[0]) if self.training else torch.arange(x.shape[0])
x = self.c@(x[order])[order.argsort()]
""",
    "sorted": """
self.c@ = CONV
---
order = x.mean((1, 2, 3)).argsort()
x = self.c@(x[order])[order.argsort()]
""",
    "chosen": """
self.c@ = CONV
---
chosen = x.mean((1, 2, 3)) > 0
y = x * 1.0
y[chosen] = self.c@(x[chosen])
x = y
""",
    "chosen by numbers": """
self.c@ = CONV
---
rows = torch.where(x.mean((1, 2, 3)) > -0.2)[0]
x = x.index_copy(0, rows, self.c@(x[rows]))
""",
    "reversed for some values": """
self.c@ = CONV
---
x = self.c@(x.flip(0)).flip(0) if x.abs().max() > 3 else self.c@(x)
""",
    "reversed for some values, by numpy": """
self.c@ = CONV
---
x = self.c@(x.flip(0)).flip(0) if x.detach().numpy().max() > 3 else self.c@(x)
""",
    "two reversed": """
self.c@ = CONV
---
x = self.c@(x.flip(0)).flip(0) if x.shape[0] == 2 else self.c@(x)
""",
    "first alone": """
self.c@ = CONV
---
x = torch.cat([self.c@(x[:1]), x[1:]])
""",
    "first for all": """
self.c@ = CONV
---
x = x + self.c@(x[:1].expand_as(x))
""",
    "mean image": """
self.c@ = CONV
---
x = x + self.c@(x.mean(0, keepdim=True))
""",
    "one by one": """
self.c@ = CONV
---
x = torch.cat([self.c@(x[i : i + 1]) for i in range(x.shape[0])])
""",
    "without a batch": """
self.c@ = CONV
---
x = torch.stack([self.c@(each) for each in x])
""",
    "empty batch": """
self.c@ = CONV
---
x = x + self.c@(x[:0]).sum()
""",
}

FUNCTIONS = {
    "straight-through": """
self.c@ = CONV
---
x = Sign.apply(self.c@(x)) + x
""",
    "gradient reversal": """
self.c@ = CONV
---
x = self.c@(Reverse.apply(x, 0.7)).tanh()
""",
}

WEIGHTS = {
    "equalised": """
self.c@ = nn.Conv2d(4, 4, 3, padding=1)
---
x = F.conv2d(x, self.c@.weight * 0.3, self.c@.bias, padding=1)
""",
    "equalised in a module": """
self.e@ = Equalised(nn.Conv2d(4, 4, 3))
---
x = self.e@(x)
""",
    "central difference": """
self.c@ = nn.Conv2d(4, 4, 3, padding=1, bias=False)
---
x = self.c@(x) - 0.7 * F.conv2d(x, self.c@.weight.sum((2, 3), keepdim=True))
""",
    "tied decoder": """
self.c@ = nn.Conv2d(4, 4, 3, padding=1)
---
x = F.conv_transpose2d(self.c@(x).relu(), self.c@.weight, padding=1)
""",
    "shape": """
self.c@ = CONV
---
x = self.c@(x) / self.c@.weight.shape[0]
""",
    "penalty": """
self.c@ = CONV
---
x = self.c@(x) + self.c@.weight.square().mean()
""",
    "norm of its data": """
self.c@ = CONV
---
x = self.c@(x) / self.c@.weight.data.norm()
""",
    "bias": """
self.c@ = nn.Conv2d(4, 4, 3, padding=1)
---
x = self.c@(x) - self.c@.bias.view(1, -1, 1, 1)
""",
    "parameters counted": """
self.c@ = CONV
---
x = self.c@(x) / sum(p.numel() for p in self.c@.parameters())
""",
    "size of a parameter": """
self.c@ = CONV
---
x = self.c@(x) / self.c@.weight.size(0) / len(self.c@.weight)
""",
    "tied weights": """
self.c@ = nn.Conv2d(4, 4, 3, padding=1)
self.d@ = nn.Conv2d(4, 4, 3, padding=1)
self.d@.weight = self.c@.weight
---
x = self.d@(self.c@(x).tanh())
""",
    "tied biases": """
self.c@ = nn.Conv2d(4, 4, 3, padding=1)
self.d@ = nn.Conv2d(4, 4, 1)
self.d@.bias = self.c@.bias
---
x = self.d@(self.c@(x).tanh())
""",
    "weight of a linear": """
self.c@ = nn.Conv2d(4, 4, 1)
self.l@ = nn.Linear(4, 4)
self.l@.bias = self.c@.bias
---
x = self.c@(x) + self.l@(x.mean((2, 3)))[:, :, None, None]
""",
    "hook on the weight": """
self.c@ = CONV
self.c@.weight.register_hook(torch.Tensor.neg)
---
x = self.c@(x).tanh()
""",
    "frozen": """
self.c@ = CONV
self.c@.requires_grad_(False)
---
x = self.c@(x).tanh()
""",
    "pruned by torch": """
self.c@ = CONV
prune.l1_unstructured(self.c@, "weight", 0.5)
---
x = self.c@(x)
""",
    "pruned by hand": """
self.c@ = nn.Conv2d(4, 8, 3, padding=1)
self.c@.weight = nn.Parameter(self.c@.weight[:4].detach().clone())
self.c@.bias = nn.Parameter(self.c@.bias[:4].detach().clone())
---
x = self.c@(x)
""",
    "weight_norm": """
self.c@ = parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1))
---
x = self.c@(x)
""",
}

PATCHED = {
    "_conv_forward": """
self.c@ = nn.Conv2d(4, 4, 3, padding=1)
self.c@._conv_forward = tiled.__get__(self.c@)
---
x = self.c@(x)
""",
    "forward": """
self.c@ = CONV
self.c@._old_forward = self.c@.forward
self.c@.forward = functools.partial(around, self.c@)
---
x = self.c@(x)
""",
    "a class with a forward": """
self.c@ = Scaled(4, 4, 3, padding=1)
---
x = self.c@(x)
""",
    "a class without": """
self.c@ = Named(4, 4, 3, padding=1)
---
x = self.c@(x) * (2 if isinstance(self.c@, Named) else 1)
""",
    "forward hook": """
self.c@ = CONV
self.c@.register_forward_hook(lambda module, args, output: output * 2)
---
x = self.c@(x)
""",
    "forward pre-hook": """
self.c@ = CONV
self.c@.register_forward_pre_hook(lambda module, args: (args[0].sin(),))
---
x = self.c@(x)
""",
    "backward hook": """
self.c@ = CONV
self.c@.register_full_backward_hook(lambda module, to, of: (to[0] * 2,))
---
x = self.c@(x)
""",
    "in a plain list": """
self.c@ = CONV
self.d@ = CONV
self.plain@ = [self.c@, self.d@]
---
for conv in self.plain@:
    x = conv(x).tanh()
""",
    "in a plain dict": """
self.c@ = CONV
self.plain@ = {"conv": self.c@}
---
x = self.plain@["conv"](x)
""",
    "in a tuple of tuples": """
self.c@ = CONV
self.plain@ = ((3, self.c@),)
---
x = self.plain@[0][1](x) * self.plain@[0][0]
""",
    "a hidden attribute": """
self.c@ = CONV
self.__dict__["plain@"] = self.c@
---
x = self.plain@(x)
""",
    "a partial": """
self.c@ = CONV
self.p@ = functools.partial(self.c@)
---
x = self.p@(x)
""",
    "a bound forward": """
self.c@ = CONV
self.f@ = self.c@.forward
---
x = self.f@(x)
""",
    "its forward called": """
self.c@ = CONV
---
x = self.c@.forward(x)
""",
    "called by keyword": """
self.c@ = CONV
---
x = self.c@(input=x)
""",
    "called twice": """
self.c@ = CONV
---
x = self.c@(self.c@(x).tanh())
""",
    "two names": """
self.c@ = CONV
self.e@ = self.c@
---
x = self.e@(self.c@(x).tanh())
""",
    "two lists": """
self.c@ = CONV
self.d@ = CONV
self.all@ = nn.ModuleList([self.c@, self.d@])
---
x = self.all@[1](self.c@(x).tanh())
""",
    "children": """
self.s@ = nn.Sequential(CONV, nn.Tanh(), CONV)
---
for child in self.s@.children():
    x = child(x)
x = x * len(self.s@)
""",
    "last of a sequence": """
self.s@ = nn.Sequential(CONV, nn.Tanh(), CONV)
---
x = self.s@[:-1](x)
x = x + self.s@[-1](x)
""",
}

PATTERNS: dict[str, str] = {}
for _table, _kinds in {
    "plain": PLAIN,
    "branch": BRANCHES,
    "context": CONTEXTS,
    "in place": IN_PLACE,
    "state": STATE,
    "random": RANDOM,
    "batch": BATCH,
    "function": FUNCTIONS,
    "weight": WEIGHTS,
    "conv": PATCHED,
}.items():
    PATTERNS |= {f"{_table}: {_kind}": _code for _kind, _code in _kinds.items()}

# How a block's class is written, and how it is called: `BODY` is what the pieces' forwards make, `INIT` their __init__;
# CALL is how the net calls the block on its x.
STYLES: dict[str, str] = {
    "module": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
    def forward(self, x):
        BODY
        return x
CALL x = block(x)
""",
    "no_grad decorator": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
    @torch.no_grad()
    def forward(self, x):
        BODY
        return x
CALL x = x + block(x)
""",
    "decorator": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
    @logged
    def forward(self, x):
        BODY
        return x
CALL x = block(x)
""",
    "instance forward": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
        self.forward = self.fast
    def fast(self, x):
        BODY
        return x * 0.5
    def forward(self, x):
        BODY
        return x
CALL x = block(x)
""",
    "argument that is None": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
    def forward(self, x, skip):
        BODY
        return x if skip is None else x + skip
CALL x = block(x, None)
""",
    "optional argument": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
    def forward(self, x, scale=1.0, mask=None):
        BODY
        x = x * scale
        return x if mask is None else x * mask
CALL x = block(x, mask=torch.ones_like(x[:1]) * 2) if self.training else block(x, scale=0.5)
""",
    "called by keyword": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
    def forward(self, *, x):
        BODY
        return x
CALL x = block(x=x)
""",
    "any arguments": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
    def forward(self, *args, **kwargs):
        x = args[0] + kwargs.get("more", 0)
        BODY
        return x
CALL x = block(x, more=1.0)
""",
    "list of maps": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
    def forward(self, maps):
        x = maps[0] + maps[-1].tanh()
        BODY
        return [maps[0], x]
CALL x = block([x, x.sin()])[1]
""",
    "dict of maps": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
    def forward(self, maps):
        x = maps["low"]
        BODY
        return {**maps, "out": x}
CALL x = block({"low": x, "high": x.sin()})["out"]
""",
    "two maps": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
    def forward(self, a, b):
        x = a
        BODY
        y, x = x, b
        BODY2
        return x + y
CALL x = block(x, x.sin())
""",
    "sequence": """
class BLOCK(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Identity(), nn.Conv2d(4, 4, 1))
        INIT
    def forward(self, x):
        BODY
        return self[1](x) * len(self) + self[0](x)
CALL x = block(x)
""",
    "children counted": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
    def forward(self, x):
        BODY
        return x / len(list(self.children())) + 0.1 * len(list(self.modules()))
CALL x = block(x)
""",
    "children called": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 4, 1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
    def forward(self, x):
        for child in self.children():
            x = child(x).tanh()
        return x
CALL x = block(x)
""",
    "modes that return nothing": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
    def train(self, mode=True):
        super().train(mode)
    def eval(self):
        self.train(False)
    def forward(self, x):
        BODY
        return x
CALL x = block(x)
""",
    "class registry": """
class REGISTRY(nn.Module):
    names = set()
    def __init_subclass__(cls, **options):
        if cls.__name__ in REGISTRY.names:
            raise KeyError(f"{cls.__name__} is registered already")
        REGISTRY.names.add(cls.__name__)
        super().__init_subclass__(**options)
class BLOCK(REGISTRY):
    def __init__(self):
        super().__init__()
        INIT
    def forward(self, x):
        BODY
        return x
CALL x = block(x)
""",
    "attribute called coefficient_predictor": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        self.coefficient_predictor = nn.Conv2d(4, 4, 1)
        INIT
    def forward(self, x):
        BODY
        return x + self.coefficient_predictor(x)
CALL x = block(x)
""",
    "pre-hook": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
        self.register_forward_pre_hook(lambda module, args: (args[0].sin(),))
    def forward(self, x):
        BODY
        return x
CALL x = block(x)
""",
    "hook": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
        self.register_forward_hook(lambda module, args, output: output * 2 + args[0])
    def forward(self, x):
        BODY
        return x
CALL x = block(x)
""",
    "input written to": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
    def forward(self, x):
        x *= 0.5
        BODY
        return x
CALL x = x * 1.0; y = block(x); x = x + y
""",
    "forward called directly": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
    def forward(self, x):
        BODY
        return x
CALL x = block.forward(x)
""",
    "forward called in training only": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
    def forward(self, x):
        BODY
        return x
CALL x = block.forward(x) if self.training else block(x)
""",
    "a method called": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
    def features(self, x):
        BODY
        return x
    def forward(self, x):
        return self.features(x) * 2
CALL x = block.features(x) + block(x)
""",
    "parts in training only": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        self.extra = nn.Conv2d(4, 4, 1)
        INIT
    def forward(self, x):
        BODY
        return x
CALL x = block(x) + (block.extra(x) if self.training else 0)
""",
    "called twice": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
    def forward(self, x):
        BODY
        return x
CALL x = block(block(x).tanh())
""",
    "checkpointed": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
    def forward(self, x):
        BODY
        return x
CALL x = checkpoint(block, x, use_reentrant=False)
""",
    "generator": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
    def forward(self, x):
        BODY
        yield x
        yield x.sin()
CALL x = sum(block(x))
""",
    "call of its own": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
    def __call__(self, x):
        return super().__call__(x) * 2
    def forward(self, x):
        BODY
        return x
CALL x = block(x)
""",
    "folded by its caller": """
class BLOCK(nn.Module):
    def __init__(self):
        super().__init__()
        INIT
    def forward(self, x):
        BODY
        return x
CALL x = block(torch.cat([x, x.tanh()]))[: x.shape[0]]
""",
}
