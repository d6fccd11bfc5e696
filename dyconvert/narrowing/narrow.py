"""narrow(model): fewer channels, and weights that make up for them; then dynamic convs."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from dyconvert.analysis.flops import macs
from dyconvert.arguments import as_arguments, first_image
from dyconvert.copying import clear_hooks, copied, on_meta, skeleton
from dyconvert.errors import ModelError, PlanError, brief
from dyconvert.marks import mark_narrowing, narrowing_of
from dyconvert.methods import Method
from dyconvert.narrowing import choose
from dyconvert.narrowing.budget import by_flops, by_width
from dyconvert.narrowing.calibrate import collect_images, images_that_fit, map_similarity, positions_for, sample
from dyconvert.narrowing.cut import Choice, Folds, cut
from dyconvert.narrowing.flow import find_aims
from dyconvert.narrowing.graph import Graph, Group, channel_groups
from dyconvert.narrowing.reconstruct import reconstruct
from dyconvert.narrowing.record import NarrowedGroup, Narrowing, changes, rebuild_narrowed
from dyconvert.surgery.blocks import check_convertible
from dyconvert.surgery.convert import convert, plan, preview
from dyconvert.surgery.observe import example_for

# Mixing kernels takes multiply-adds too, as many more as there are weights: known when the channels are.
_ATTEMPTS = 5

Init = Literal["least-squares", "merge", "l1"]
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

    Channels that are coupled are clustered together, by the correlation of their feature maps; each cluster becomes
    one channel. The weights are then solved layer by layer so that the narrow model computes what the original does
    at the channels that are left. The model's outputs, the stem where no residual stream is tied to it, and what
    `keep` names keep their channels. The result computes something near to what `model` does, and needs fine-tuning.

    Args:
        model: a static model; left as it is, unless `inplace`.
        width: the share of its channels that each group keeps, 0 < width <= 1.
        flops: instead of a width, the share of the original's multiply-adds to stay below; the channels are taken
            where they are missed least.
        example: an input, or the tuple of the forward's arguments. None: a calibration image, or common sizes.
        data: calibration images: a DataLoader, another iterable of batches, or a tensor `[N, C, H, W]`. Clean ones,
            not augmented, as the model takes them. Labels aren't used.
        g: number of experts per conv. None: the method's own.
        method: as :func:`~dyconvert.convert` takes it.
        init: where the weights come from. `"least-squares"`, the default with data: ridge regression, layer by
            layer. `"merge"`, the default without: a cluster's filters are averaged, what reads them is added up.
            `"l1"`: the filters of the largest L1 norm stay as they are (Li et al. 2017, arXiv:1608.08710).
        static: don't convert: a narrow static model, the control.
        keep: shell patterns over modules whose output channels all stay.
        round_to: channel counts are rounded to a multiple of this; of less in groups of few channels.
        calibration_images: how many of `data` are used, at most; fewer where their maps take over 4 GiB.
        seed: of the sampled positions, and of the experts' differences.
        diversity: how far the experts differ at first, as :func:`~dyconvert.convert` takes it.
        progress: called with what is being done, how much of it is done, and how much there is.
        inplace: change `model` itself. After an error it is still untouched.
        choices: what else :func:`~dyconvert.plan` takes for the conversion: scope, exclude, strict, ...

    Returns:
        A model of the same class. `result.dyconvert_narrowing` says what was narrowed; :func:`~dyconvert.save` and
        :func:`~dyconvert.load` know about it.

    Raises:
        ModelError: a width or target out of range, data that is missing or that the model rejects, or a model whose
            channels can't be followed; the message names the operator.
        PlanError: an unknown init, a pattern that matches nothing, or a conversion that can't be planned.
    """
    init = _check(model, width, flops, data, init, round_to, calibration_images, static, choices)
    tell = progress or (lambda what, done, total: None)
    images = None
    if data is not None and init != "l1":
        images = collect_images(data, calibration_images, next(model.parameters()))
    example = _example(model, example, images)
    keep = (keep,) if isinstance(keep, str) else keep
    original = _runner(model)
    _check_takes(original, example, "example")
    if images is not None:
        _check_takes(original, (images[:1],), "calibration images")
    tell("following the channels", 0, 1)
    graph = channel_groups(model, example, keep)

    samples: dict[str, Tensor] = {}
    positions = None
    if images is not None:
        aims = find_aims(original, (images[:1],))
        images = images[: images_that_fit(original, images[:1])]
        channels = sum(group.size * len(group.makers) for group in graph.groups)
        positions = positions_for(len(images), channels, seed)
        samples = sample(original, images, aims, positions, lambda *at: tell("looking at images", *at))
    similarity = {group.name: _similarity(model, samples, graph, group) for group in graph.free}

    def pick(counts: dict[str, int]) -> dict[str, Choice]:
        return {
            group.name: _choose(model, graph, group, similarity[group.name], counts[group.name], init)
            for group in graph.free
        }

    if width is not None:
        chosen = pick(by_width(graph, width, round_to))
    else:
        whole, one = macs(original, first_image(example)), first_image(example)
        reserve = 0.0
        for _ in range(_ATTEMPTS):
            chosen = pick(by_flops(graph, flops, similarity, round_to, reserve))
            trial = on_meta(model)
            _cut(trial, graph, Folds(graph, chosen), merge=False)
            if not static:
                trial = preview(trial, plan(trial, method, g, example=example, **choices))
            over = macs(trial, one) / whole - flops
            if over <= 0:
                break
            reserve += over + 1e-3

    folds = Folds(graph, chosen)
    narrowed = copied(model)
    _cut(narrowed, graph, folds, merge=init != "l1")
    _check_runs(original, narrowed, example)
    if init == "least-squares":
        with _quiet(narrowed):
            reconstruct(narrowed, images, samples, folds, positions, lambda *at: tell("solving layers", *at))
    record = Narrowing(
        model=type(model).__name__,
        width=width,
        flops=flops,
        init=init,
        groups=[
            NarrowedGroup(
                name=group.name,
                before=group.size,
                after=len(chosen[group.name].kept) if group.name in chosen else group.size,
                kept=group.kept,
            )
            for group in graph.groups
        ],
        modules=changes(model, narrowed),
    )
    mark_narrowing(narrowed, record)
    planned = None if static else plan(narrowed, method, g, example=example, **choices)
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


def _check(
    model: nn.Module,
    width: float | None,
    flops: float | None,
    data: Any,
    init: str | None,
    round_to: int,
    calibration_images: int,
    static: bool,
    choices: dict[str, Any],
) -> str:
    check_convertible(model)
    if narrowing_of(model) is not None:
        raise ModelError("The model is narrowed already. Narrow the original, by as much as is wanted in all.")
    if (width is None) == (flops is None):
        raise PlanError("narrow() takes a width or a share of the multiply-adds (flops). Give one of the two.")
    for name, value in (("width", width), ("flops", flops)):
        if value is not None and not 0 < value <= 1:
            raise PlanError(f"{name}={value:g} is out of range. It is a share of the original's: 0 < {name} <= 1.")
    if init is None:
        init = "merge" if data is None else "least-squares"
    if init not in get_args(Init):
        raise PlanError(f"init is one of {', '.join(get_args(Init))}, not {init!r}.")
    if init == "least-squares" and data is None:
        raise PlanError(
            "init='least-squares' solves the weights on images, and there are none. Give `data=...`, or choose "
            "`init='merge'`."
        )
    for name, value in (("round_to", round_to), ("calibration_images", calibration_images)):
        if value < 1:
            raise PlanError(f"{name}={value} is out of range. It is at least 1.")
    if static and choices:
        raise PlanError(f"static=True converts nothing, so {', '.join(choices)} would do nothing. Give one of them.")
    return init


def _example(model: nn.Module, example: Any, images: Tensor | None) -> tuple[Any, ...]:
    if example is None and images is not None:
        example = images[:2]
    if example is None:
        return example_for(model)
    return as_arguments(example)


def _runner(model: nn.Module) -> nn.Module:
    """A copy that shares the model's tensors, in eval mode, without the user's hooks."""
    runner = skeleton(model, lambda t: t.detach()).eval()
    clear_hooks(runner)
    return runner


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, and without hooks, for as long as it is being solved."""
    modes = [(module, module.training) for module in model.modules()]
    hooks = [
        (owner, dict(owner)) for m in model.modules() for owner in (m._forward_hooks, m._forward_pre_hooks) if owner
    ]
    model.eval()
    clear_hooks(model)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for owner, held in hooks:
            owner.update(held)


def _similarity(model: nn.Module, samples: dict[str, Tensor], graph: Graph, group: Group) -> Tensor:
    found = map_similarity(samples, graph, group) if samples else None
    return choose.filter_similarity(model, graph, group) if found is None else found


def _choose(model: nn.Module, graph: Graph, group: Group, similarity: Tensor, count: int, init: str) -> Choice:
    if init == "l1":
        return choose.strongest(choose.filter_strength(model, graph, group), count, group)
    return choose.choose(similarity, count, group)


def _cut(model: nn.Module, graph: Graph, folds: Folds, *, merge: bool) -> None:
    try:
        cut(model, graph, folds, merge=merge)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} can't be narrowed: {brief(error)}. Keep the channels of the module it is about: "
            "`keep=[...]`."
        ) from error


def _check_takes(model: nn.Module, arguments: tuple[Any, ...], what: str) -> None:
    try:
        with torch.no_grad():
            model(*tree_map_only(Tensor, torch.clone, arguments))
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} rejects the {what}: {brief(error)}. Give what its forward takes, at its size and "
            "normalised as it is used to: `example=...`, `data=...`."
        ) from error


def _check_runs(original: nn.Module, narrowed: nn.Module, example: tuple[Any, ...]) -> None:
    """Refuse a narrowed model that doesn't run, or returns other shapes."""
    runner = _runner(narrowed)
    inside: list[str] = []

    def entered(name: str) -> Callable[..., None]:
        return lambda *_: inside.append(name)

    def left(*_: Any) -> None:
        inside.pop()

    for name, module in runner.named_modules():
        module.register_forward_pre_hook(entered(name))
        module.register_forward_hook(left)
    with torch.no_grad():
        expected = _shapes(original(*tree_map_only(Tensor, torch.clone, example)))
        try:
            found = _shapes(runner(*tree_map_only(Tensor, torch.clone, example)))
        except Exception as error:
            where = inside[-1] if inside and inside[-1] else type(narrowed).__name__
            raise ModelError(
                f"{type(narrowed).__name__} doesn't run when its channels are narrowed: {where} raises {brief(error)}. "
                "It counts on their number; keep the channels that it reads: `keep=[...]`."
            ) from error
    if found != expected:
        raise ModelError(
            f"{type(narrowed).__name__} returns {found} when its channels are narrowed, not {expected}. "
            "Keep the channels of its last layers: `keep=[...]`."
        )


def _shapes(output: Any) -> list[list[int]]:
    return [list(leaf.shape) for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)]
