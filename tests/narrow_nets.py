"""Networks whose forwards do what real ones do, for narrowing: `[N, 3, 16, 16]` to `[N, 5]` or so."""

import contextlib
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Trunk(nn.Module):
    """Two residual blocks' worth of convs; a subclass says how it goes on from `[N, 32, 8, 8]`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.conv1 = nn.Conv2d(32, 48, 3, 2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(48)
        self.conv2 = nn.Conv2d(48, 32, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.short = nn.Conv2d(32, 32, 1, 2)
        self.head = nn.Linear(32, 5)

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.short(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


# ---- Other operators for one image than for many ----


class Tokens(Trunk):
    """A linear over pixels, by `reshape(-1, C)`."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(32, 24)
        self.back = nn.Linear(24, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        n, c, h, w = x.shape
        flat = x.permute(0, 2, 3, 1).reshape(-1, c)
        flat = flat + self.back(F.relu(self.mix(flat)))
        return self.head(flat.reshape(n, h * w, c).mean(1))


class Contiguous(Trunk):
    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x.transpose(0, 1).contiguous().transpose(0, 1).contiguous())
        return self.head(x.mean((2, 3)))


class AsksTheBatch(Trunk):
    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 1:
            x = x + 0.0
            x = x.abs() * x.sign()
        return super().forward(x)


class PerImage(Trunk):
    """A loop over the images, before convs that see them all."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.stack([image - image.mean() for image in x])
        return super().forward(x)


class ConvPerImage(Trunk):
    """A conv that is called once for each image."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = torch.cat([F.relu(self.each(image[None])) for image in x])
        return self.head(x.mean((2, 3)))


class EinsumHead(Trunk):
    """Attention pooling by einsum: its operators depend on the sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Conv2d(32, 32, 1)
        self.score = nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        value, score = self.value(x).flatten(2), self.score(x).flatten(2).softmax(2)
        return self.head(torch.einsum("ncp,nhp->nch", value, score).mean(2))


class EinsumChannels(Trunk):
    """A 1 x 1 conv that is written as an einsum over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(32, 32) / 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.einsum("nchw,cd->ndhw", self.features(x), self.mix).relu().mean((2, 3)))


# ---- Factory functions ----


class Coordinates(Trunk):
    """CoordConv: two channels more, that the forward makes."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Conv2d(34, 32, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        n, _, h, w = x.shape
        rows = torch.linspace(-1, 1, h, dtype=x.dtype).view(1, 1, h, 1).expand(n, 1, h, w)
        columns = (torch.arange(w, dtype=x.dtype) / w).view(1, 1, 1, w).expand(n, 1, h, w)
        return self.head(F.relu(self.place(torch.cat([x, rows, columns], 1))).mean((2, 3)))


class CoordinatesFirst(Trunk):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(5, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        rows = torch.linspace(-1, 1, h, dtype=x.dtype).view(1, 1, h, 1).expand(n, 1, h, w)
        columns = torch.linspace(-1, 1, w, dtype=x.dtype).view(1, 1, 1, w).expand(n, 1, h, w)
        return super().forward(self.enter(torch.cat([x, rows, columns], 1)))


class ZerosShortcut(Trunk):
    """A shortcut that is padded by zeros_like."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(32, 64, 3, padding=1)
        self.last = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.last(F.relu(self.wide(x) + torch.cat([x, torch.zeros_like(x)], 1)).mean((2, 3)))


class AddsZeros(Trunk):
    """Sums that start at zeros of the forward's own."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        total = torch.zeros_like(x)
        for _ in range(2):
            total = total + F.relu(x)
        return self.head((total * torch.full((), 0.5, dtype=x.dtype)).mean((2, 3)))


# ---- Gates and attention ----


class OneChannelGate(Trunk):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Conv2d(32, 1, 1)
        self.after = nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.head(F.relu(self.after(x * self.gate(x).sigmoid())).mean((2, 3)))


class SpatialAttention(Trunk):
    """CBAM (arXiv:1807.06521): the mean and the maximum over the channels make one map."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 32, 1)
        self.spatial = nn.Conv2d(2, 1, 5, padding=2)
        self.after = nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        pooled = x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        x = x * sum(self.up(F.relu(self.down(p))) for p in pooled).sigmoid()
        maps = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True).values], 1)
        return self.head(F.relu(self.after(x * self.spatial(maps).sigmoid())).mean((2, 3)))


class SelectiveKernel(Trunk):
    """SKNet (arXiv:1903.06586): a softmax over two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=2, dilation=2)
        self.down, self.up = nn.Conv2d(32, 16, 1), nn.Conv2d(16, 64, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        both = torch.stack([self.a(x), self.b(x)], 1)
        weights = self.up(F.relu(self.down(both.sum(1).mean((2, 3), keepdim=True))))
        weights = weights.view(len(x), 2, -1, 1, 1).softmax(1)
        return self.head(F.relu((both * weights).sum(1)).mean((2, 3)))


class Product(Trunk):
    """StarNet (arXiv:2403.19967): two branches are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(32, 64, 1), nn.Conv2d(32, 64, 1)
        self.join = nn.Conv2d(64, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.head((x + self.join(F.relu6(self.a(x)) * self.b(x))).mean((2, 3)))


class Pyramid(nn.Module):
    """A small FPN: lateral convs, a sum with what is upsampled, one head for all levels."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
            for a, b in ((16, 24), (24, 32), (32, 48))
        )
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in (24, 32, 48))
        self.smooth = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(3))
        self.tower = nn.Conv2d(width, width, 3, padding=1)
        self.score = nn.Conv2d(width, 5, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        x, maps = self.stem(x), []
        for down in self.down:
            x = down(x)
            maps.append(x)
        maps = [lateral(m) for lateral, m in zip(self.lateral, maps, strict=True)]
        for level in (1, 0):
            maps[level] = maps[level] + F.interpolate(maps[level + 1], size=maps[level].shape[2:])
        maps = [smooth(m) for smooth, m in zip(self.smooth, maps, strict=True)]
        return [self.score(F.relu(self.tower(m))) for m in maps]


class OwnAutocast(Trunk):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.features(x)
        return self.head(x.float().mean((2, 3)))


class Twice(Trunk):
    """A conv that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.head(F.relu(x + self.again(F.relu(self.again(x)))).mean((2, 3)))


class LooksAtValues(Trunk):
    """Other operators for some values than for others."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        if (x.mean() > 0.1).item():
            x = x + 0.0
        return self.head((x + x.mean()).mean((2, 3)))


class GainConv(nn.Conv2d):
    """A conv with a gain of its own for each filter, as timm's ScaledStdConv2d."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, self.out_channels).view(-1, 1, 1, 1))
        self.register_buffer("offset", torch.linspace(-0.1, 0.1, self.out_channels))

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.gain, self.bias) + self.offset.view(-1, 1, 1)


class Gains(Trunk):
    """Convs with more parameters than torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = GainConv(32, 48, 3, 2, 1)
        self.conv2 = GainConv(48, 32, 3, 1, 1)


class HalfAffine(Trunk):
    """Norms with a weight and no bias, or a bias and no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1.bias = None
        self.bn2.weight = None
        self.norm = nn.GroupNorm(1, 32)
        self.norm.bias = None

    def features(self, x: Tensor) -> Tensor:
        return self.norm(super().features(x))


class LinearAttention(Trunk):
    """EfficientViT's (arXiv:2205.14756): queries, keys and values of two scales, in heads, and maps again."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.join = nn.Conv2d(32, 48, 1), nn.Conv2d(32, 32, 1)
        self.wider = nn.Sequential(nn.Conv2d(48, 48, 5, padding=2, groups=48), nn.Conv2d(48, 48, 1, groups=6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        qkv = self.qkv(x)
        heads = torch.cat([qkv, self.wider(qkv)], 1).reshape(len(x), -1, 24, x[0, 0].numel()).transpose(-1, -2)
        q, k, v = heads.chunk(3, -1)
        v = F.pad(v, (0, 1), value=1.0)
        made = F.relu(q) @ (F.relu(k).transpose(-1, -2) @ v)
        made = (made[..., :-1] / (made[..., -1:] + 1e-3)).transpose(-1, -2)
        return self.head((x + self.join(made.reshape(len(x), -1, *x.shape[2:]))).mean((2, 3)))


class Repeated(Trunk):
    """A map beside itself is added to a wider one: each of its channels goes along with two of the other's."""

    def __init__(self, wide_first: bool) -> None:
        super().__init__()
        self.wide_first = wide_first
        self.wide = nn.Conv2d(32, 48, 3, padding=1)
        self.small = nn.Conv2d(32, 24, 3, padding=1)
        self.join = nn.Conv2d(48, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        if self.wide_first:
            wide = self.wide(x)
            small = self.small(x)
        else:
            small = self.small(x)
            wide = self.wide(x)
        return self.head(self.join(F.relu(torch.cat([small, small], 1) + wide)).mean((2, 3)))


class PartialResiduals(Trunk):
    """As in ReXNet: each block is a little wider, and its input is added to the first of its channels."""

    def __init__(self) -> None:
        super().__init__()
        widths = [32, 36, 40, 44, 48, 52, 56, 60]
        self.blocks = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.join = nn.Conv2d(60, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        for block in self.blocks:
            y = block(F.relu(x))
            x = torch.cat([y[:, : x.shape[1]] + x, y[:, x.shape[1] :]], 1)
        return self.head(self.join(F.relu(x)).mean((2, 3)))


PROGRAMS: dict[str, Callable[[], nn.Module]] = {
    "reshape(-1, C)": Tokens,
    "contiguous": Contiguous,
    "len(x) > 1": AsksTheBatch,
    "loop over images": PerImage,
    "conv per image": ConvPerImage,
    "einsum head": EinsumHead,
    "einsum over channels": EinsumChannels,
    "coordinates": Coordinates,
    "coordinates first": CoordinatesFirst,
    "zeros_like shortcut": ZerosShortcut,
    "zeros to start with": AddsZeros,
    "one-channel gate": OneChannelGate,
    "spatial attention": SpatialAttention,
    "selective kernel": SelectiveKernel,
    "product": Product,
    "pyramid": Pyramid,
    "autocast inside": OwnAutocast,
    "called twice": Twice,
    "looks at values": LooksAtValues,
    "gains": Gains,
    "half affine": HalfAffine,
    "linear attention": LinearAttention,
    "a map twice, after the wide one": lambda: Repeated(wide_first=True),
    "a map twice, before the wide one": lambda: Repeated(wide_first=False),
    "partial residuals": PartialResiduals,
}


@contextlib.contextmanager
def nothing():
    yield
