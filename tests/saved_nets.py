"""The networks behind tests/data/saved: checkpoints as earlier versions wrote them, which have to go on loading.

`python tests/saved_nets.py FOLDER` wrote them, with the version that `dyconvert.json` names. They are never written
again: a later format gets a folder of its own.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from nets import BasicBlock, ResidualNet, seeded, trained
from safetensors.torch import save_file
from torch import Tensor, nn

import dyconvert
from dyconvert import models
from dyconvert.marks import mark_narrowing
from dyconvert.narrowing.record import Narrowing, changes

OUTPUTS = "outputs.safetensors"


class DenseLayer(nn.Module):
    """As DenseNet's: it is given the list of all maps before it, so the predictor reads their concatenation."""

    def __init__(self, in_channels: int, growth: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 2 * growth, 1, bias=False)
        self.conv2 = nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.conv2(self.conv1(torch.cat(maps, 1)).relu()).relu()


class DenseNet(nn.Module):
    """A stem and three dense layers: `[N, 3, 16, 16]` to `[N, 5]`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.layers = nn.ModuleList(DenseLayer(4 + 2 * i, 2) for i in range(3))
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.stem(x).relu()]
        for layer in self.layers:
            maps.append(layer(maps))
        return self.head(torch.cat(maps, 1).mean((2, 3)))


class SkipBlock(nn.Module):
    """A decoder's block, with an optional second map; in training it drops pixels."""

    def __init__(self, channels: int):
        super().__init__()
        self.up = nn.ConvTranspose2d(channels, channels, 2, 2)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=2)

    def forward(self, x: Tensor, skip: Tensor | None = None, scale: float = 1.0) -> Tensor:
        x = nn.functional.dropout(self.up(x), 0.1, self.training)
        if skip is not None:
            x = x + skip
        return self.conv(x).relu() * scale


class DecoderNet(nn.Module):
    """A strided stem and two decoder blocks, one with the stem's input beside: `[N, 3, 16, 16]` to `[N, 4, 32, 32]`."""

    def __init__(self) -> None:
        super().__init__()
        self.beside = nn.Conv2d(3, 4, 1)
        self.stem = nn.Conv2d(3, 4, 2, 2)
        self.block1 = SkipBlock(4)
        self.block2 = SkipBlock(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.block2(self.block1(self.stem(x).relu(), skip=self.beside(x)))


class ResNet(nn.Module):
    """As torchvision's ResNet-18, with a block a stage: `[N, 3, 16, 16]` to `[N, 5]`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, 2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(BasicBlock(4, 4))
        self.layer2 = nn.Sequential(BasicBlock(4, 6, 2))
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(self.bn1(self.conv1(x)).relu())).mean((2, 3)))


def narrowed(convert: bool) -> nn.Module:
    """`ResidualNet` of half the width, as if it had been narrowed."""
    narrow = seeded(ResidualNet, 3, seed=3)
    mark_narrowing(
        narrow,
        Narrowing(model="ResidualNet", width=0.5, init="l1", modules=changes(seeded(ResidualNet, 6), narrow)),
    )
    return trained(narrow, g=2) if convert else narrow


# The static architecture, and what was saved.
SAVED: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "resnet-dynet": (ResNet, lambda: trained(seeded(ResNet), method="dynet", g=2)),
    "resnet-condconv": (ResNet, lambda: trained(seeded(ResNet), method="condconv", g=3)),
    "resnet-dyconv-by-block": (ResNet, lambda: trained(seeded(ResNet), method="dyconv", g=2, scope="block")),
    "densenet-dynet": (DenseNet, lambda: trained(seeded(DenseNet), method="dynet", g=2)),
    "decoder-dynet": (
        DecoderNet,
        lambda: trained(seeded(DecoderNet), method="dynet", g=2, example=torch.zeros(1, 3, 16, 16)),
    ),
    "net3d-dynet": (
        lambda: ResidualNet(3, 3),
        lambda: trained(seeded(ResidualNet, 3, 3), g=2, example=torch.zeros(1, 3, 4, 8, 8)),
    ),
    "narrowed": (lambda: ResidualNet(6), lambda: narrowed(False)),
    "narrowed-dynet": (lambda: ResidualNet(6), lambda: narrowed(True)),
    "static": (lambda: ResidualNet(3), lambda: seeded(ResidualNet, 3)),
    "float64": (ResNet, lambda: trained(seeded(ResNet).double(), g=2)),
}


def images(name: str, dtype: torch.dtype) -> Tensor:
    """Two images, by a formula, so that they needn't be kept; their outputs are."""
    shape = {"net3d-dynet": (2, 3, 4, 8, 8), "builtin": (2, 1, 8, 8), "decoder-dynet": (2, 3, 8, 8)}
    shape = shape.get(name, (2, 3, 16, 16))
    return torch.arange(math.prod(shape), dtype=torch.float64).mul(0.7).sin().reshape(shape).to(dtype)


def write(folder: Path) -> None:
    """Save every network, with what it computes for two images."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (_, make) in SAVED.items():
        keep(dyconvert.save(make(), folder / name, static=True), name, make())
    static, source = models.create("builtin:digits-resnet8", "none", {"width": 2})
    dynamic = trained(static, g=2)
    keep(dyconvert.save(dynamic, folder / "builtin", source=source), "builtin", dynamic)


def keep(directory: Path, name: str, model: nn.Module) -> None:
    with torch.no_grad():
        found = model.eval()(images(name, next(model.parameters()).dtype))
    save_file({"outputs": found.contiguous()}, directory / OUTPUTS)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
