"""analyse(model): everything that a report shows, as data. Drawing is apart, in dyconvert.report."""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from pydantic import BaseModel
from torch import nn

from dyconvert.analysis import findings
from dyconvert.analysis.ablation import Ablation, RunCurves
from dyconvert.analysis.accuracy import Accuracy
from dyconvert.analysis.coefficients import Coefficients
from dyconvert.analysis.correlation import (
    ExpertCorrelation,
    LayerCorrelation,
    check_layer,
    default_layer,
    expert_correlation,
)
from dyconvert.analysis.cost import ModelCost, cost
from dyconvert.analysis.findings import Finding
from dyconvert.analysis.images import ImageSet
from dyconvert.analysis.passing import check_finite, pass_over
from dyconvert.analysis.resolution import Resolution, around, resolution, takes_images
from dyconvert.arguments import as_arguments, first_image
from dyconvert.errors import ModelError
from dyconvert.marks import plan_of
from dyconvert.nn import DynamicConv
from dyconvert.surgery.convert import plan as plan_model
from dyconvert.surgery.example import example_for
from dyconvert.surgery.plan import Plan
from dyconvert.version import __version__

Progress = Callable[[str, int, int | None], None]


class Analysis(BaseModel):
    """All that was found about a model. A part that is None was left out, and `left_out` says why.

    Attributes:
        name: of the model; `original`: of the static one that it is compared with; `narrow`: of the narrower one.
        dynamic: whether it has a dynamic conv at all.
        data: what images were seen; `images` of `images_in_data`; `shape` of one, `[C, H, W]`.
        accuracy: top-1 of the model and of the original, by classes, where the images' classes are the outputs.
        sampled: sentences that name the figures that come from a sample.
        conditions: versions, threads, date.
        seconds: what making the analysis took, by part.
    """

    name: str
    original: str | None = None
    narrow: str | None = None
    dynamic: bool
    plan: Plan
    data: str | None = None
    images: int = 0
    images_in_data: int = 0
    shape: list[int] = []
    classes: list[str] = []
    accuracy: Accuracy | None = None
    correlations: list[LayerCorrelation] = []
    experts: list[ExpertCorrelation] = []
    coefficients: Coefficients | None = None
    resolution: Resolution | None = None
    cost: ModelCost | None = None
    run: RunCurves | None = None
    ablation: Ablation | None = None
    findings: list[Finding] = []
    left_out: dict[str, str] = {}
    sampled: list[str] = []
    conditions: dict[str, str] = {}
    seconds: dict[str, float] = {}


def analyse(
    model: nn.Module,
    images: ImageSet | Iterable[Any] | None = None,
    *,
    original: nn.Module | None = None,
    narrow: nn.Module | None = None,
    layers: Sequence[str] = (),
    classes: Sequence[str] = (),
    example: Any = None,
    sizes: Sequence[int] | None = None,
    batch_size: int | None = None,
    seconds: float = 5.0,
    cpu_time: bool = False,
    run: RunCurves | None = None,
    ablation: Ablation | None = None,
    names: dict[str, str] | None = None,
    progress: Progress | None = None,
) -> Analysis:
    """Measure a model: its coefficients, its correlations, and where its cost is.

    Args:
        model: converted, or static: then the parts about coefficients are left out. All models are left as they are.
        images: an :class:`~dyconvert.analysis.images.ImageSet`, or batches: `(images, labels)` or images. None: the
            parts that need images are left out.
        original: the static model that it was made from.
        narrow: a static model that is as narrow, for its latency.
        layers: whose feature maps are correlated; by default that of the paper, see
            :func:`~dyconvert.analysis.correlation.default_layer`.
        classes: names of the labels, where `images` aren't an ImageSet.
        example: an input, or the tuple of the forward's arguments. None: common sizes are tried.
        sizes: input sizes in pixels at which latency is measured; an empty list: it isn't. None: half of to twice the
            example's.
        batch_size: images at a time; by default as many as have about a million pixels, 100 at most.
        seconds: of measuring, per input size; 0: no times are measured.
        cpu_time: count CPU time, which others on the machine disturb less.
        run, ablation: what fine-tuning wrote, to be shown with the rest.
        names: what to call "model", "original" and "narrow"; by default after their classes.
        progress: called with the name of the present step, the number of its parts that are done, and their total.

    Raises:
        ModelError: a model has NaN in its weights, no convs, or rejects the images; a layer has no such name.
    """
    names = {} if names is None else names
    models = {"model": model, "original": original, "narrow": narrow}
    called = {key: names.get(key, type(each).__name__) for key, each in models.items() if each is not None}
    tell = progress or (lambda *_: None)
    tell("looking at the weights", 0, None)
    for key, name in called.items():
        check_finite(models[key], name)
    if example is None:
        example = example_for(model, batch=1)
    example = as_arguments(example)
    one = first_image(example)
    own = plan_of(model)
    plan = own or plan_model(model, example=one)
    dynamic = {name: m for name, m in model.named_modules() if isinstance(m, DynamicConv)}
    result = Analysis(
        name=called["model"],
        original=called.get("original"),
        narrow=called.get("narrow"),
        dynamic=bool(dynamic),
        plan=plan,
        run=run,
        ablation=ablation,
    )
    chosen = dict.fromkeys(layers, "asked for")
    for layer in chosen:
        check_layer(model, layer)
    began = time.perf_counter()
    if images is None:
        result.left_out["correlation"] = result.left_out["coefficients"] = "no images were given"
    else:
        _look(result, model, original, images, chosen or dict([default_layer(plan)]), classes, batch_size, tell)
        result.seconds["images"] = time.perf_counter() - began
    if not dynamic:
        result.left_out["coefficients"] = "the model has no dynamic conv"
    correlations = (expert_correlation(name, conv) for name, conv in dynamic.items())
    result.experts = [each for each in correlations if each is not None]

    began = time.perf_counter()
    tell("counting and timing blocks", 0, None)
    clock = time.process_time if cpu_time else time.perf_counter
    result.cost = cost(model, plan, one, original, seconds=seconds, clock=clock)
    result.seconds["cost"] = time.perf_counter() - began
    began = time.perf_counter()
    sizes = around(one[0] if one else None) if sizes is None else sizes
    _time_sizes(result, model, original, narrow, sizes, seconds, cpu_time, tell)
    result.seconds["resolution"] = time.perf_counter() - began
    if ablation is None:
        result.left_out["ablation"] = "no sweep was given"
    if narrow is None:
        result.left_out["static narrow"] = "no static model of the dynamic one's width was given"
    _conclude(result, cpu_time)
    return result


def _look(
    result: Analysis,
    model: nn.Module,
    original: nn.Module | None,
    images: ImageSet | Iterable[Any],
    layers: dict[str, str],
    classes: Sequence[str],
    batch_size: int | None,
    tell: Progress,
) -> None:
    count = None
    batches: Any = images
    if isinstance(images, ImageSet):
        height, width = images.shape[1:]
        size = batch_size or min(max(2**20 // (height * width), 8), 100)
        count, classes, batches = len(images), images.classes, images.batches(size)
        result.data, result.images_in_data = images.name, images.total
    statistics = pass_over(
        model,
        batches,
        against=original,
        layers=layers,
        classes=classes,
        count=count,
        progress=lambda done: tell("looking at images", done, count),
    )
    result.data = result.data or "batches of your own"
    result.images, result.shape, result.classes = statistics.images, statistics.shape, list(classes)
    result.images_in_data = max(result.images_in_data, statistics.images)
    result.accuracy, result.coefficients, result.correlations = (
        statistics.accuracy,
        statistics.coefficients,
        statistics.correlations,
    )
    if result.images < result.images_in_data:
        result.sampled.append(f"images: {result.images} of {result.images_in_data}, evenly spread")
    for layer in statistics.correlations:
        correlation = layer.model
        per_image = correlation.positions / statistics.images
        maps = (
            f"{correlation.compared} of {correlation.maps} maps"
            if correlation.compared < correlation.maps
            else f"all {correlation.maps} maps"
        )
        if correlation.compared < correlation.maps:
            maps += " (evenly spread)"
        where = f"{correlation.positions} positions: {per_image:g} of each image, at random"
        result.sampled.append(f"correlation of {layer.layer}: {maps}, at {where}")
    if statistics.coefficients is not None:
        result.sampled += statistics.coefficients.sampled


def _time_sizes(
    result: Analysis,
    model: nn.Module,
    original: nn.Module | None,
    narrow: nn.Module | None,
    sizes: Sequence[int],
    seconds: float,
    cpu_time: bool,
    tell: Progress,
) -> None:
    mine = "dynamic" if result.dynamic else "static" if original is not None else "original"
    models = {"original": original, mine: model, "narrow": narrow}
    models = {name: each for name, each in models.items() if each is not None}
    if not takes_images(models):
        result.left_out["resolution"] = "the model doesn't take two-dimensional images"
    elif not sizes or seconds <= 0:
        result.left_out["resolution"] = "no times were asked for"
    else:
        try:
            result.resolution = resolution(
                models,
                sizes,
                seconds=seconds,
                cpu=cpu_time,
                progress=lambda done, of: tell("timing input sizes", done, of),
            )
        except ModelError as error:
            result.left_out["resolution"] = str(error)


def _conclude(result: Analysis, cpu_time: bool) -> None:
    conclusions: list[Finding] = []
    if result.coefficients is not None:
        # Whether they move at all decides what the rest means, so it is said first.
        result.findings += findings.of_movement(result.coefficients)
        conclusions += findings.of_coefficients(result.coefficients)
    if result.accuracy is not None:
        conclusions += findings.of_accuracy(result.accuracy)
    if result.ablation is not None:
        conclusions += findings.of_control(result.ablation)
    conclusions += findings.of_correlations(result.correlations)
    result.findings += sorted(conclusions, key=lambda finding: finding.level != "warning")
    result.conditions = {
        "dyconvert": __version__,
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "clock": "CPU time" if cpu_time else "wall time",
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }
