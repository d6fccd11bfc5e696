"""narrow(model): fewer channels with weights that make up for them; then dynamic convs."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from dyconvert.analysis.flops import macs
from dyconvert.arguments import as_arguments, first_image
from dyconvert.copying import copied
from dyconvert.limits import DIVERSITY
from dyconvert.marks import mark_narrowing
from dyconvert.methods import Method
from dyconvert.names import checked_patterns
from dyconvert.narrowing.calibrate import Samples, images_that_fit, sample
from dyconvert.narrowing.channels import Chooser, Chosen, cut_channels
from dyconvert.narrowing.checks import Init, bare, check_no_scripts, check_runs, check_takes, checked_init, example_of
from dyconvert.narrowing.coupling import channel_groups
from dyconvert.narrowing.cut import Folds
from dyconvert.narrowing.graph import Graph, check_free, keep_unsteady
from dyconvert.narrowing.images import Images, collect_images
from dyconvert.narrowing.positions import Positions, held_out, positions_for
from dyconvert.narrowing.record import NarrowedGroup, Narrowing, NarrowingWarning, changes, rebuild_narrowed
from dyconvert.narrowing.weights import give_weights, warn_of_width
from dyconvert.numbers import real, seed_of
from dyconvert.surgery.convert import convert, plan, preview

Progress = Callable[[str, int, int], None]


def narrow(
    model: nn.Module,
    *,
    width: float | None = None,
    flops: float | None = None,
    example: Any = None,
    data: Iterable[Any] | None = None,
    g: int | None = None,
    method: str | Method = "dynet",
    init: Init | None = None,
    static: bool = False,
    keep: Sequence[str] = (),
    round_to: int = 8,
    calibration_images: int = 1000,
    seed: int = 0,
    diversity: float = 0.1,
    progress: Progress | None = None,
    inplace: bool = False,
    **choices: Any,
) -> nn.Module:
    """Narrow a pretrained model, and convert it: DyNet's way to speed (arXiv:2004.10694), for weights that exist.

    Coupled channels are clustered by the correlation of their feature maps; each cluster becomes one channel. Then the
    weights are solved layer by layer, so that the narrow model computes the original's maps at the kept channels. All
    channels are kept of the model's outputs, of the stem if no residual stream is tied to it, and of the modules that
    `keep` names. The result is near to the original, and needs fine-tuning.

    Args:
        model: a static model; it isn't changed, unless `inplace`.
        width: the share of its channels that each group keeps, 0 < width <= 1.
        flops: in place of a width, the largest share of the original's multiply-adds; channels are removed where they
            are missed least.
        example: an input, or the tuple of the forward's arguments. None: a calibration image, or common sizes.
        data: calibration images: a DataLoader, another iterable of batches, or a tensor `[N, C, H, W]`. They should be
            normalised for the model, and not augmented. Labels aren't used. The last fifth, at most 100, is held out.
            Images of other sizes than the example's are resized to it; without an example, to the most frequent size.
        g: number of experts per conv. None: the method's own.
        method: see :func:`~dyconvert.convert`.
        init: the origin of the weights. `"least-squares"`, the default with data: ridge regression, layer by layer.
            `"merge"`, the default without data: a cluster's filters are averaged, and the weights that read them added
            up. `"l1"`: the filters of the largest L1 norm are kept unchanged (Li et al. 2017, arXiv:1608.08710).
        static: don't convert: the result is a narrow static model, as a control.
        keep: shell patterns over modules whose output channels are all kept.
        round_to: channel counts are rounded to a multiple of this; in groups of few channels, of less.
        calibration_images: at most so many images of `data` are used; fewer if their maps would take over 4 GiB.
        seed: for the sampled positions, and for the experts' differences.
        diversity: how far the experts differ at first; see :func:`~dyconvert.convert`.
        progress: called with the name of the present step, the number of its parts that are done, and their total.
        inplace: change `model` itself. After an error it is unchanged.
        choices: further arguments of :func:`~dyconvert.plan` for the conversion: scope, exclude, strict, ...

    Returns:
        A model of the same class. `result.dyconvert_narrowing` has the numbers of channels, the errors of each layer
        and of the outputs on held-out images, and warnings, each of them also a :class:`NarrowingWarning`;
        :func:`~dyconvert.save` and :func:`~dyconvert.load` handle such models.

    Raises:
        ModelError: the target can't be reached, the model rejects the data, or its channels can't be followed; the
            message names the operator.
        PlanError: an option is out of range, a pattern matches nothing, or the conversion can't be planned.
    """
    init = checked_init(model, width, flops, data, init, round_to, calibration_images, static, choices)
    check_no_scripts(model)
    seed, diversity = seed_of(seed), real("diversity", diversity, 0, DIVERSITY)
    tell = progress or (lambda what, done, total: None)
    keep = checked_patterns(keep)
    with _undisturbed(model):
        images = None if data is None else collect_images(data, calibration_images, model, _arguments(example))
        example = example_of(model, example, images)
        original = bare(model)
        check_takes(original, example, "example")
        if images is not None:
            check_takes(original, images.part(0, 1), "calibration images")
            images = images.head(images_that_fit(original, images))
        tell("following the channels", 0, 1)
        graph = channel_groups(model, example, keep)
        tell("looking at images", 0, 1)
        samples, positions = _sample_original(original, images, graph, init, seed)
        chooser = Chooser(model, graph, samples, init, round_to)
        if width is not None:
            chosen = chooser.by_width(width)
        else:
            converted = None if static else lambda m: preview(m, plan(m, method, g, example=example, **choices))
            chosen = chooser.by_flops(flops, example, converted)
        narrowed = copied(model)
        folds = Folds(graph, chosen.choices)
        cut_channels(narrowed, graph, folds, merge=init != "l1")
        check_runs(original, narrowed, example)
        one = first_image(example)
        record = _record(width, flops, init, graph, chosen, images)
        record.model, record.macs = type(model).__name__, macs(narrowed, one) / max(macs(model, one), 1)
        warn_of_width(record)
        if images is not None:
            give_weights(original, narrowed, images, samples, folds, positions, record, tell)
        record.modules = changes(model, narrowed)
        mark_narrowing(narrowed, record)
        planned = None if static else plan(narrowed, method, g, example=example, **choices)
    for warning in record.warnings:
        warnings.warn(f"{record.model}, narrowed: {warning}.", NarrowingWarning, stacklevel=2)
    if inplace:
        rebuild_narrowed(model, record).load_state_dict(narrowed.state_dict())
        narrowed = model
    if planned is None:
        return narrowed
    return convert(
        narrowed,
        planned,
        inplace=True,
        seed=seed,
        diversity=diversity,
        progress=lambda name, done, total: tell("converting", done, total),
    )


def _arguments(example: Any) -> tuple[Any, ...] | None:
    return None if example is None else as_arguments(example)


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Leaves the caller's contexts (autocast, inference mode, a default device), and restores the random generator."""
    devices = {p.device.type for p in model.parameters()} | {"cpu"}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.random.fork_rng(devices=()))
        # No cache: with one, a model's own autocast would use cached weights from before they were solved.
        for device in devices - {"meta"}:
            stack.enter_context(torch.autocast(device, enabled=False, cache_enabled=False))
        if devices == {"cpu"}:
            stack.enter_context(torch.device("cpu"))
        yield


def _sample_original(
    original: nn.Module, images: Images | None, graph: Graph, init: str, seed: int
) -> tuple[Samples | None, Positions | None]:
    """Sample the original's maps on the images. Layers that can't be recognised in them keep their channels."""
    if images is None or init == "l1":
        return None, None
    positions = positions_for(len(images), sum(group.size * len(group.makers) for group in graph.groups), seed)
    samples = sample(original, images, positions)
    keep_unsteady(graph, samples.unsteady)
    check_free(original, graph)
    return samples, positions


def _record(
    width: float | None,
    flops: float | None,
    init: str,
    graph: Graph,
    chosen: Chosen,
    images: Images | None,
) -> Narrowing:
    record = Narrowing(
        model="",
        width=width,
        flops=flops,
        init=init,
        images=None if images is None else len(images),
        held_out=None if images is None else held_out(len(images)),
        groups=[
            NarrowedGroup(
                name=group.name,
                before=group.size,
                after=len(chosen.choices[group.name].kept) if group.name in chosen.choices else group.size,
                kept=group.kept,
            )
            for group in graph.groups
        ],
        modules=[],
        warnings=images.notes if images is not None else [],
    )
    if chosen.missed is not None:
        record.warnings.append(
            f"{chosen.missed:.4g} of the multiply-adds are left, more than the {flops:g} that was asked for: layers "
            "whose channels are kept, and operators that belong to no layer, take the rest. Ask for less, or keep less"
        )
    return record
