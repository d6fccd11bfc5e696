"""Pearson correlation between the feature maps of a layer, and between the experts of a conv (DyNet, figure 6).

Correlated feature maps repeat one another; DyNet's claim is that dynamic kernels repeat less. Streamed: memory is
C x C numbers a layer, however many images are seen.
"""

import difflib
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from dyconvert.errors import ModelError
from dyconvert.nn import DynamicConv
from dyconvert.surgery.plan import Plan, PlannedConv

BINS = 40
# The least |r| of a strong, a middle and a weak correlation; less is none.
BANDS = {"strong": 0.6, "middle": 0.4, "weak": 0.2, "none": 0.0}
# At most this many feature maps of a layer are compared. If there are more, they are taken at even intervals.
MAX_MAPS = 512
# At most this many positions are looked at, over all images. If there are more, they are drawn at random.
MAX_POSITIONS = 640_000
POSITIONS_PER_IMAGE = 64
# Pairs that are named.
PAIRS = 8
# From here on two maps carry the same.
SAME = 0.999


class Pair(BaseModel):
    """Two feature maps, by their output channels, and their correlation."""

    first: int
    second: int
    r: float


class Correlation(BaseModel):
    """The correlations of all pairs, as a distribution.

    Attributes:
        pairs: how many.
        bands: the share of them with |r| in each of the bands strong, middle, weak, none.
        histogram: how many are in each of `BINS` equal parts of -1..1.
        mean_absolute: mean of |r|.
        strongest: the pairs with the largest |r|.
        constant: maps that never vary: they correlate with nothing, and are left out.
        maps: feature maps of the layer, and how many of them were compared.
        positions: places, over all images, at which they were compared.
    """

    pairs: int
    bands: dict[str, float]
    histogram: list[int]
    mean_absolute: float
    strongest: list[Pair] = []
    constant: list[int] = []
    maps: int = 0
    compared: int = 0
    positions: int = 0


class LayerCorrelation(BaseModel):
    """The feature maps of one layer: in the model, and in the one that it is compared with, if it has the layer."""

    layer: str
    why: str
    model: Correlation
    original: Correlation | None = None


class ExpertCorrelation(BaseModel):
    """The experts of one conv: for each output channel, the correlation of its kernels in each two experts."""

    conv: str
    g: int
    between: Correlation


def default_layer(plan: Plan) -> tuple[str, str]:
    """The layer that figure 6 looks at, in any model, and why it is the one.

    The paper takes the second-last stage of MobileNetV2. A stage, here, is a run of convs that read maps of one
    size; the layer is its last conv that isn't depthwise. Where sizes are unknown or all the same, it is the conv
    before the last third of all.

    Raises:
        ModelError: the plan has no convs.
    """
    convs = [c for c in plan.convs if not c.groups == c.in_channels > 1] or plan.convs
    if not convs:
        raise ModelError("There is no conv whose feature maps could be compared.")
    # Convs that see pooled maps are beside the stages.
    sized = [c for c in convs if c.map_size and max(c.map_size) > 1]
    sizes = list(dict.fromkeys(c.map_size for c in sized))
    if len(sizes) > 1:
        size = sizes[-2]
        chosen = [c for c in sized[: _first_smaller(sized, size)] if c.map_size == size]
        # A conv that makes maps smaller, and what stands beside it, reads this size but belongs to the next stage.
        inner = [c for c in chosen if not _starts_next(c, sized)] or chosen
        return inner[-1].name, f"the last conv of the second-last stage, whose maps are {'x'.join(map(str, size))}"
    return convs[-1 - len(convs) // 3].name, "two thirds of the way; the model's maps have one size"


def _first_smaller(sized: Sequence[PlannedConv], size: tuple[int, ...]) -> int:
    """Where, after the first conv that reads maps of this size, one reads smaller maps."""
    start = next(i for i, conv in enumerate(sized) if conv.map_size == size)
    return next((i for i in range(start, len(sized)) if max(sized[i].map_size) < max(size)), len(sized))


def _starts_next(conv: PlannedConv, sized: Sequence[PlannedConv]) -> bool:
    """Whether a conv stands in a block, or two levels around it in a module, that goes on at a smaller size."""
    parent = conv.name.rpartition(".")[0]
    around = conv.block or parent.rpartition(".")[0] or parent
    beside = (c for c in sized if around and c.name.startswith(f"{around}."))
    return any(max(c.map_size) < max(conv.map_size) for c in beside)


def check_layer(model: nn.Module, layer: str) -> None:
    """Refuse a name that is no module of the model.

    Raises:
        ModelError: with the nearest names.
    """
    names = [name for name, _ in model.named_modules() if name]
    if layer not in names:
        near = difflib.get_close_matches(layer, names, cutoff=0.3) or names[:3]
        raise ModelError(f"{layer!r} is no layer of {type(model).__name__}. Names look like {', '.join(near)}.")


def summarise(r: Tensor, **more: Any) -> Correlation:
    """The distribution of correlations `r`, `[pairs]`, those that are not NaN."""
    r = r[~r.isnan()].clamp(-1, 1)
    size = r.abs()
    bands, above = {}, float("inf")
    for name, low in BANDS.items():
        bands[name] = float(((size >= low) & (size < above)).double().mean()) if len(r) else 0.0
        above = low
    bins = ((r + 1) / 2 * BINS).long().clamp(0, BINS - 1)
    return Correlation(
        pairs=len(r),
        bands=bands,
        histogram=torch.bincount(bins, minlength=BINS).tolist(),
        mean_absolute=float(size.mean()) if len(r) else 0.0,
        **more,
    )


class MapCorrelation:
    """Collects the correlation of a layer's feature maps, batch by batch.

    Args:
        images: how many there will be, to choose how many positions of each are looked at. None: unknown.
    """

    def __init__(self, images: int | None = None) -> None:
        positions = MAX_POSITIONS // images if images else POSITIONS_PER_IMAGE
        self._per_image = max(1, min(positions, POSITIONS_PER_IMAGE))
        self._generator = torch.Generator().manual_seed(0)
        self._count = 0
        self._maps = 0
        self._chosen: Tensor | None = None

    def add(self, maps: Tensor) -> None:
        """Feature maps `[N, C, *spatial]` (or `[N, C]`), an output of the layer."""
        if self._chosen is None:
            self._maps = maps.shape[1]
            maps_kept = min(self._maps, MAX_MAPS)
            self._chosen = torch.arange(maps_kept) * self._maps // maps_kept
            self._mean = torch.zeros(maps_kept, dtype=torch.float64)
            self._products = torch.zeros(maps_kept, maps_kept, dtype=torch.float64)
        x = maps.detach().cpu().unsqueeze(2).flatten(2)  # [N, C, positions]
        if x.shape[2] > self._per_image:
            x = x[:, :, torch.randperm(x.shape[2], generator=self._generator)[: self._per_image]]
        x = x[:, self._chosen].double().transpose(1, 2).flatten(0, 1)  # [N * positions, C]
        if not len(x):
            return
        # As for coefficients: Chan, Golub and LeVeque's merge, here of the products of all pairs.
        mean = x.mean(0)
        centred = x - mean
        apart = mean - self._mean
        total = self._count + len(x)
        self._products += centred.T @ centred + torch.outer(apart, apart) * (self._count * len(x) / total)
        self._mean += apart * (len(x) / total)
        self._count = total

    def matrix(self) -> Tensor:
        """Correlations `[C, C]`; NaN for a map that never varies."""
        deviation = self._products.diagonal().sqrt()
        noise = 1e-9 * (self._mean.abs() * self._count**0.5).clamp_min(1e-30)
        deviation = torch.where(deviation <= noise, float("nan"), deviation)
        return self._products / torch.outer(deviation, deviation)

    def result(self) -> Correlation | None:
        """None if the layer never ran."""
        if not self._count:
            return None
        r = self.matrix()
        first, second = torch.triu_indices(len(r), len(r), 1)
        flat = r[first, second]
        best = flat.abs().nan_to_num(-1).topk(min(PAIRS, len(flat))).indices
        chosen = self._chosen.tolist()
        strongest = [
            Pair(first=chosen[first[i]], second=chosen[second[i]], r=max(-1.0, min(1.0, float(flat[i]))))
            for i in best.tolist()
            if not flat[i].isnan()
        ]
        return summarise(
            flat,
            strongest=strongest,
            constant=[chosen[i] for i in r.diagonal().isnan().nonzero().flatten().tolist()],
            maps=self._maps,
            compared=len(chosen),
            positions=self._count,
        )


def expert_correlation(name: str, conv: DynamicConv) -> ExpertCorrelation | None:
    """How alike the experts of a conv are: Pearson's r between their kernels, for each output channel and two experts.

    None where there is nothing to compare: one expert, or kernels of one number.
    """
    bank = conv.experts().detach().flatten(2).double()  # [g, channels, elements]
    if conv.g < 2 or bank.shape[2] < 2:
        return None
    x = bank - bank.mean(2, keepdim=True)
    size = x.square().sum(2).sqrt()
    x = x / torch.where(size == 0, float("nan"), size).unsqueeze(2)
    first, second = torch.triu_indices(conv.g, conv.g, 1).tolist()
    r = torch.cat([(x[i] * x[j]).sum(1) for i, j in zip(first, second, strict=True)])
    return ExpertCorrelation(conv=name, g=conv.g, between=summarise(r, maps=bank.shape[1], compared=bank.shape[1]))
