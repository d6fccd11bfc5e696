"""Random conv nets for the property test: a strategy for their descriptions, and the modules that they describe.

A description is a nest of dataclasses, so that a failing example can be read, and pasted into a test.
"""

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from nets import CONV, NORM
from torch import Tensor, nn
from torch.nn import functional as F

DROPOUT = {1: nn.Dropout1d, 2: nn.Dropout2d, 3: nn.Dropout3d}
# Pixels along each side of the images: few, so that five hundred nets run in a minute.
SIDE = {1: 12, 2: 9, 3: 5}


@dataclass(frozen=True)
class Conv:
    """A conv, perhaps with what usually follows one."""

    inputs: int
    outputs: int
    kernel: tuple[int, ...]
    stride: int = 1
    dilation: int = 1
    padding: Any = 0
    mode: str = "zeros"
    groups: int = 1
    bias: bool = True
    norm: bool = False
    activation: str = ""
    dropout: str = ""

    def build(self, dims: int) -> nn.Module:
        conv = CONV[dims](
            self.inputs,
            self.outputs,
            self.kernel,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias,
            self.mode,
        )
        layers: list[nn.Module] = [conv]
        if self.norm:
            layers.append(NORM[dims](self.outputs))
        if self.activation:
            layers.append(nn.ReLU(inplace=self.activation == "inplace"))
        if self.dropout == "module":
            layers.append(nn.Dropout(0.5))
        elif self.dropout == "maps":
            layers.append(DROPOUT[dims](0.5))
        elif self.dropout == "function":
            layers.append(FunctionalDropout())
        return layers[0] if len(layers) == 1 else nn.Sequential(*layers)


@dataclass(frozen=True)
class Chain:
    """A module of its own around parts in a row: a block, unless a part is one."""

    parts: tuple[Any, ...]

    def build(self, dims: int) -> nn.Module:
        return InARow([part.build(dims) for part in self.parts])


@dataclass(frozen=True)
class Residual:
    """`x + body(x)`."""

    body: Any

    def build(self, dims: int) -> nn.Module:
        return Adds(self.body.build(dims))


@dataclass(frozen=True)
class Branches:
    """The parts' outputs for the same map, concatenated."""

    parts: tuple[Any, ...]

    def build(self, dims: int) -> nn.Module:
        return Concatenates([part.build(dims) for part in self.parts])


@dataclass(frozen=True)
class Again:
    """One module, called twice in a row."""

    part: Any

    def build(self, dims: int) -> nn.Module:
        return Twice(self.part.build(dims))


@dataclass(frozen=True)
class SameModule:
    """One module under two names, with something between."""

    part: Any
    between: Any

    def build(self, dims: int) -> nn.Module:
        part = self.part.build(dims)
        return nn.Sequential(part, self.between.build(dims), part)


@dataclass(frozen=True)
class Net:
    """A stem, parts in a row, and a head."""

    dims: int
    width: int
    parts: tuple[Any, ...]
    outputs: int

    def build(self, seed: int = 0) -> nn.Module:
        """In eval mode, in float64; its weights depend on the seed only."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed)
            model = Classifier(self).double().eval()
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.running_mean.normal_(0, 0.5)
                    module.running_var.uniform_(0.5, 2)
        return model

    def images(self, batch: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, 3, *[SIDE[self.dims]] * self.dims, generator=generator, dtype=torch.float64)


class FunctionalDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.3, self.training)


class InARow(nn.Module):
    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


class Adds(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Concatenates(nn.Module):
    def __init__(self, branches: list[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class Twice(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.part(self.part(x))


class Classifier(nn.Module):
    def __init__(self, net: Net) -> None:
        super().__init__()
        self.stem = CONV[net.dims](3, net.width, 3, padding=1)
        self.body = nn.Sequential(*[part.build(net.dims) for part in net.parts])
        self.head = nn.Linear(net.outputs, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).flatten(2).mean(2))


def _divisors(n: int, m: int) -> list[int]:
    return [d for d in range(1, min(n, m) + 1) if n % d == m % d == 0]


@st.composite
def convs(draw: st.DrawFn, dims: int, channels: int, side: int, outputs: int | None = None, keep: bool = False) -> Conv:
    """A conv that takes `[N, channels, side, ...]`; with `keep` its maps are as large as its input's."""
    outputs = outputs or draw(st.sampled_from((4, 6, 8)))
    groups = draw(st.sampled_from(_divisors(channels, outputs)))
    dilation = draw(st.sampled_from((1, 1, 2)))
    sizes = (1, 3) if keep else (1, 2, 3)
    kernel = tuple(draw(st.sampled_from(sizes)) for _ in range(dims))
    around = tuple(dilation * (k - 1) // 2 for k in kernel)
    # PyTorch has no reflection of volumes' sides that are as long as the padding, nor any padding that wraps twice.
    modes = ["zeros", "circular", "replicate", "reflect"] if side > max(around) + 1 else ["zeros"]
    if keep:
        stride, padding = 1, draw(st.sampled_from(("same", around)))
    else:
        stride = draw(st.sampled_from((1, 2))) if side > 3 else 1
        paddings = [around, "valid", tuple(a + 1 for a in around)] if side > 4 else [around]
        padding = draw(st.sampled_from(paddings))
        if padding not in (around, "valid"):
            modes = ["zeros"] if side <= max(padding) + 1 else modes
    return Conv(
        channels,
        outputs,
        kernel,
        stride,
        dilation,
        padding,
        draw(st.sampled_from(modes)),
        groups,
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from(("", "plain", "inplace"))),
        draw(st.sampled_from(("", "", "", "module", "maps", "function"))),
    )


@st.composite
def same_shape(draw: st.DrawFn, dims: int, channels: int, side: int, depth: int) -> Any:
    """Something whose output has its input's shape."""
    conv = convs(dims, channels, side, channels, keep=True)
    kind = draw(st.sampled_from(("conv", "chain", "residual", "again", "named twice") if depth else ("conv",)))
    if kind == "conv":
        return draw(conv)
    inner = same_shape(dims, channels, side, depth - 1)
    if kind == "chain":
        return Chain((draw(conv), draw(inner)))
    if kind == "residual":
        return Residual(Chain((draw(conv), draw(inner))) if draw(st.booleans()) else draw(inner))
    return Again(draw(inner)) if kind == "again" else SameModule(draw(inner), draw(conv))


@st.composite
def nets(draw: st.DrawFn) -> Net:
    dims = draw(st.sampled_from((1, 2, 2, 2, 3)))
    width = channels = draw(st.sampled_from((4, 6)))
    side = SIDE[dims]
    parts: list[Any] = []
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(("conv", "same shape", "same shape", "branches")))
        if kind == "conv" and side > 2:
            conv = draw(convs(dims, channels, side))
            parts.append(Chain((conv, draw(convs(dims, conv.outputs, 2, keep=True)))) if draw(st.booleans()) else conv)
            side = min(_side(conv, side, dim) for dim in range(dims))
            channels = conv.outputs if parts[-1] is conv else parts[-1].parts[-1].outputs
        elif kind == "branches":
            branches = [draw(convs(dims, channels, side, keep=True)) for _ in range(draw(st.integers(2, 3)))]
            if draw(st.booleans()):
                branches[0] = Chain((draw(same_shape(dims, channels, side, 0)), branches[0]))
            parts.append(Branches(tuple(branches)))
            channels = sum(_outputs(branch) for branch in branches)
        else:
            parts.append(draw(same_shape(dims, channels, side, 2)))
    return Net(dims, width, tuple(parts), channels)


def _outputs(part: Any) -> int:
    return part.outputs if isinstance(part, Conv) else _outputs(part.parts[-1])


def _side(conv: Conv, side: int, dim: int) -> int:
    padding = 0 if conv.padding == "valid" else conv.padding[dim]
    return (side + 2 * padding - conv.dilation * (conv.kernel[dim] - 1) - 1) // conv.stride + 1
