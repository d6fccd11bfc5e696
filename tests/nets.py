"""Small models for tests: plain modules, seeded, converted in milliseconds.

The state-dict names and shapes are the same for every `dims` but for the kernels' dimensions.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dyconvert

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
# What the nets are given, [C, *spatial].
IMAGE = {1: (3, 16), 2: (3, 16, 16), 3: (3, 4, 8, 8)}


class FlatNet(nn.Module):
    """A stem and two convs in a row, in no block: `[N, 3, *spatial]` to `[N, 5]`."""

    def __init__(self, width: int = 8, dims: int = 2):
        super().__init__()
        conv = CONV[dims]
        self.stem = conv(3, width, 3, padding=1)
        self.conv1 = conv(width, width, 3, padding=1, groups=2)
        self.conv2 = conv(width, 2 * width, 1, bias=False)
        self.head = nn.Linear(2 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.conv1(self.stem(x).relu()).relu())
        return self.head(x.flatten(2).mean(2))


class BasicBlock(nn.Module):
    """Two convs and a shortcut: `[N, in, *spatial]` to `[N, out, *spatial / stride]`."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, dims: int = 2):
        super().__init__()
        conv, norm = CONV[dims], NORM[dims]
        self.conv1 = conv(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = norm(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = norm(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = conv(in_channels, out_channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (out + self.shortcut(x)).relu()


class ResidualNet(nn.Module):
    """A stem and a `layer1` of two basic blocks, five convs in them: `[N, 3, *spatial]` to `[N, 5]`."""

    def __init__(self, width: int = 8, dims: int = 2):
        super().__init__()
        self.stem = CONV[dims](3, width, 3, padding=1, bias=False)
        self.layer1 = nn.Sequential(BasicBlock(width, width, 1, dims), BasicBlock(width, 2 * width, 2, dims))
        self.head = nn.Linear(2 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer1(self.stem(x).relu()).flatten(2).mean(2))


def seeded(factory: Callable[..., nn.Module], *args: Any, seed: int = 0, **kwargs: Any) -> nn.Module:
    """`factory(...)` in eval mode, with weights that depend on the seed only."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return factory(*args, **kwargs).eval()


def image(batch: int = 2, dims: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal noise `[batch, *IMAGE[dims]]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *IMAGE[dims], generator=generator, dtype=torch.float64).to(dtype)


def trained(net: nn.Module, seed: int = 0, **choices: Any) -> nn.Module:
    """`net` converted, and every tensor moved as training would: its outputs are its own."""
    dynamic = dyconvert.convert(net, **choices)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*dynamic.parameters(), *dynamic.buffers()):
            if tensor.is_floating_point():
                tensor += 0.1 * torch.rand(tensor.shape, generator=generator).to(tensor)
    return dynamic


def outputs(model: nn.Module, x: Tensor | None = None) -> Tensor:
    """What the model computes for `x`, or for `image()`."""
    with torch.no_grad():
        return model(image() if x is None else x)


def same(first: nn.Module, second: nn.Module | dict[str, Tensor]) -> bool:
    """Whether two state dicts agree in names, dtypes and bits."""
    a, b = first.state_dict(), second if isinstance(second, dict) else second.state_dict()
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def listed(folder: Path) -> list[str]:
    """The names in a folder."""
    return sorted(path.name for path in folder.iterdir())


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two state dicts have the same keys and the same values."""
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
