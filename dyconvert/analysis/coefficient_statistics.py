"""Collects statistics of the coefficients, batch by batch.

All statistics are streamed: memory depends on the model and on the number of classes, not on the number of images.
"""

import heapq
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dyconvert.analysis.coefficients import (
    BINS,
    CLASS_SUMS,
    CONSTANT,
    SATURATED,
    SIGNATURE,
    TOP,
    AxisUse,
    Coefficients,
    ConvCoefficients,
    ExpertUse,
    TopImage,
)
from dyconvert.errors import ModelError
from dyconvert.nn import DynamicConv
from dyconvert.nn.mixture import Mixture
from dyconvert.surgery.watch import block_of, predictor_of


class CoefficientStatistics:
    """Collects :class:`Coefficients`, batch by batch.

    Args:
        model: a converted model.
        classes: names of the classes.
    """

    def __init__(self, model: nn.Module, classes: Sequence[str] = ()) -> None:
        self.classes = list(classes)
        self._model = model
        self._convs = {name: m for name, m in model.named_modules() if isinstance(m, DynamicConv)}
        self._streams: dict[str, dict[str, _Stream]] = {}  # of each axis
        self._labels: Tensor | None = None
        self._first = 0

    def begin(self, labels: Tensor, first: int) -> None:
        """Begin a batch: its images have the labels `[N]`, and the first one is number `first` in the data."""
        self._labels, self._first = labels, first

    def see(self, name: str, mixture: Mixture) -> None:
        """Add the mixture of one call of a conv."""
        for axis, values in mixture.axes().items():
            numbers = values.detach().double().cpu()
            if axis != "experts":
                numbers = numbers.unsqueeze(1) / 2  # [N, 1, count], from 0 to 1 as coefficients are
            if not numbers.isfinite().all():
                raise ModelError(f"The {axis} of {name} over the data aren't finite. Look for NaN in the images.")
            streams = self._streams.setdefault(name, {})
            if axis not in streams:
                streams[axis] = _Stream(numbers.shape[1], numbers.shape[2], len(self.classes))
            # A head that is called for every box or frame has another batch, whose rows aren't images.
            labels = self._labels if self._labels is not None and len(self._labels) == len(numbers) else None
            streams[axis].add(numbers, labels, self._first)

    def result(self) -> Coefficients:
        """The statistics so far."""
        convs = [self._conv(name, self._streams[name]) for name in self._convs if name in self._streams]
        sampled = [
            f"classes of {conv.name}: {conv.channels_sampled} of {conv.channels} output channels, at even intervals"
            for conv in convs
            if self.classes and conv.channels_sampled < conv.channels
        ]
        return Coefficients(
            convs=convs,
            unreached=[name for name in self._convs if name not in self._streams],
            classes=self.classes,
            sampled=sampled,
        )

    def _conv(self, name: str, streams: "dict[str, _Stream]") -> ConvCoefficients:
        stream = streams["experts"]
        conv, predictor = self._convs[name], predictor_of(self._model, name)
        own = conv.coefficient_predictor is not None
        block = None if own else block_of(self._model, name)[0]
        return ConvCoefficients(
            name=name,
            block=block,
            g=stream.g,
            per="channel" if conv.sizes.per > 1 else "layer",
            channels=stream.channels,
            activation=predictor.activation,
            temperature=float(predictor.temperature),
            **stream.summary() | ({} if conv.sizes.per else {"saturated": 0.0}),  # one expert, as it is
            axes={axis: other.axis() for axis, other in streams.items() if axis != "experts"},
        )


class _Stream:
    """Running statistics of one conv's coefficients."""

    def __init__(self, g: int, channels: int, classes: int) -> None:
        self.g, self.channels, self.classes = g, channels, classes
        self.count = 0
        self.mean = torch.zeros(g, channels, dtype=torch.float64)
        self.m2 = torch.zeros(g, channels, dtype=torch.float64)
        self.smallest = torch.full((g,), float("inf"), dtype=torch.float64)
        self.largest = torch.full((g,), float("-inf"), dtype=torch.float64)
        self.histogram = torch.zeros(g * BINS, dtype=torch.int64)
        self.saturated = 0
        self.effective = 0.0
        width = max(1, min(channels, CLASS_SUMS // max(1, g * classes)))
        self.sampled = _even_indices(channels, width)
        self.class_count = torch.zeros(classes, dtype=torch.int64)
        self.class_sums = torch.zeros(classes, g, width, dtype=torch.float64)
        self.class_means = torch.zeros(classes, g, dtype=torch.float64)
        self.top: list[list[tuple[float, int]]] = [[] for _ in range(g)]

    def add(self, eta: Tensor, labels: Tensor | None, first: int) -> None:
        images = len(eta)
        if not images:
            return
        # Chan, Golub and LeVeque 1983: the batch's mean and squares are merged into those of earlier batches.
        mean = eta.mean(0)
        apart = mean - self.mean
        total = self.count + images
        self.m2 += (eta - mean).square().sum(0) + apart.square() * (self.count * images / total)
        self.mean += apart * (images / total)
        self.count = total
        self.smallest = torch.minimum(self.smallest, eta.amin((0, 2)))
        self.largest = torch.maximum(self.largest, eta.amax((0, 2)))
        bins = (eta * BINS).long().clamp_(0, BINS - 1) + torch.arange(self.g).view(1, -1, 1) * BINS
        self.histogram += torch.bincount(bins.flatten(), minlength=self.g * BINS)
        self.saturated += int(((eta < SATURATED) | (eta > 1 - SATURATED)).sum())
        share = eta / eta.sum(1, keepdim=True).clamp_min(1e-300)
        self.effective += float(torch.special.entr(share).sum(1).exp().sum()) / self.channels
        if labels is None:
            return
        driven = (share if self.g > 1 else eta).mean(2)  # [N, g]
        for i in range(self.g):
            best = driven[:, i].topk(min(TOP, images))
            ranked = [(v, -first - j) for v, j in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
            self.top[i] = heapq.nlargest(TOP, self.top[i] + ranked)
        known = labels >= 0
        if self.classes and known.any():
            labels = labels[known]
            self.class_count += torch.bincount(labels, minlength=self.classes)
            self.class_sums.index_add_(0, labels, eta[known][:, :, self.sampled])
            self.class_means.index_add_(0, labels, eta[known].mean(2))

    def axis(self) -> AxisUse:
        """The use of one axis of factors, which were collected halved, from 0 to 1."""
        halved = self.summary()
        (use,) = halved["experts"]
        shown = _even_indices(self.channels, SIGNATURE[1])
        return AxisUse(
            count=self.channels,
            mean=2 * use.mean,
            smallest=2 * use.smallest,
            largest=2 * use.largest,
            means=(2 * self.mean[0, shown]).tolist(),
            spread=2 * halved["spread"],
            between_classes=halved["between_classes"],
            saturated=halved["saturated"],
            constant=halved["constant"],
        )

    def summary(self) -> dict[str, Any]:
        deviation = (self.m2 / self.count).sqrt()
        kinds = int((self.class_count > 0).sum())
        labelled = int(self.class_count.sum())
        between = chance = None
        signature: dict[int, list[float]] = {}
        if kinds > 1 and labelled == self.count > 1:
            there = self.class_count > 0
            apart = self.class_sums[there] / self.class_count[there].view(-1, 1, 1) - self.mean[:, self.sampled]
            total = self.m2[:, self.sampled]
            squares = (apart.square() * self.class_count[there].view(-1, 1, 1)).sum()
            between = float(squares / total.sum()) if total.sum() > 0 else 0.0
            chance = (kinds - 1) / (self.count - 1)
            scaled = apart / deviation[:, self.sampled].clamp_min(1e-12)
            scaled = torch.where(deviation[:, self.sampled] < CONSTANT, 0.0, scaled)
            scaled = scaled[:, :, _even_indices(scaled.shape[2], SIGNATURE[1])].flatten(1)
            numbers = there.nonzero().flatten().tolist()
            for row in _even_indices(kinds, SIGNATURE[0]).tolist():
                signature[numbers[row]] = [round(value, 3) for value in scaled[row].tolist()]
        histogram = self.histogram.view(self.g, BINS).tolist()
        means = self.mean.mean(1).tolist()
        experts = [
            ExpertUse(
                mean=means[i],
                smallest=float(self.smallest[i]),
                largest=float(self.largest[i]),
                histogram=histogram[i],
                class_means=[
                    float(self.class_means[k, i] / n) if n else None for k, n in enumerate(self.class_count.tolist())
                ],
                top=[TopImage(image=-j, share=value) for value, j in self.top[i]],
            )
            for i in range(self.g)
        ]
        return {
            "images": self.count,
            "spread": float(deviation.square().mean().sqrt()),
            "between_classes": between,
            "by_chance": chance,
            "channels_sampled": len(self.sampled),
            "saturated": self.saturated / (self.count * self.g * self.channels),
            "constant": float((deviation < CONSTANT).double().mean()),
            "effective": self.effective / self.count,
            "experts": experts,
            "signature": signature,
        }


def _even_indices(of: int, count: int) -> Tensor:
    """At most `count` indices of `of`, at even intervals."""
    count = min(of, count)
    return torch.arange(count) * of // count
