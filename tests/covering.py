"""What a conversion does with one model, measured: a row of `docs/coverage.md`."""

import copy
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import coverage_zoo
import torch
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

import dyconvert
from dyconvert.surgery.planning import SEES_1X1, STEM

# Rounding alone, 1e-15 to 1e-12 after a hundred layers; a conv left out or wired wrongly shows as 1e-3 and more.
FLOAT64 = 1e-9
# Nine digits fewer, for models that make float32 tensors of their own and so don't run in float64.
FLOAT32 = 1e-4
# Batch statistics over the few pixels of a small image divide by small variances, layer after layer.
TRAINING = 1e-6

CONVS = {torch.conv1d, torch.conv2d, torch.conv3d} | {getattr(torch, f"conv_transpose{dims}d") for dims in (1, 2, 3)}


@dataclass
class Row:
    """One model's figures.

    Attributes:
        case: `library:name`.
        parameters: of the static model.
        convs: modules that are convs, found without dyconvert: transposed and deformable ones included.
        converted: how many become dynamic.
        skipped: how many don't, by reason.
        blocks: how many blocks share a predictor.
        own: how many convs have a predictor of their own.
        why_own: why they do, where the method shares.
        one_pixel: convs that only see 1x1 maps.
        stems: convs that read the image.
        difference: the largest, relative to the output's largest value, in eval mode; None where none was measured.
        training: the same in training mode, with the same random numbers; not of large and detection models.
        precision: "float64", "float32", or "planned" where the model is too large to be run twice.
        compared: "outputs", or "backbone and heads" where the outputs of a detection model aren't steady.
        seconds: of a processor.
        problems: what should not be.
        method: what it was converted by.
    """

    case: str
    parameters: int = 0
    convs: int = 0
    converted: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    blocks: int = 0
    own: int = 0
    why_own: dict[str, int] = field(default_factory=dict)
    one_pixel: int = 0
    stems: int = 0
    difference: float | None = None
    training: float | None = None
    precision: str = ""
    compared: str = "outputs"
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    method: str = "dynet"

    @property
    def counted(self) -> int:
        """Convs on maps larger than 1x1, but for the stems, which no paper makes dynamic."""
        return self.convs - self.one_pixel - self.stems

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def share(rows: list[Row]) -> float:
    """Of all the convs on maps larger than 1x1 that are no stems, the part that becomes dynamic."""
    return sum(row.converted for row in rows) / sum(row.counted for row in rows)


def examine(case: str, training: bool = True, method: str = "dynet") -> Row:
    """Plan, convert and compare one model."""
    row = Row(case, method=method)
    started = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row.parameters = coverage_zoo.parameters(case)
        if coverage_zoo.is_too_large(case):
            _plan_only(case, row)
        else:
            try:
                _compare(case, row, torch.float64, training)
            except _NeedsFloat32:
                row.problems.clear()
                _compare(case, row, torch.float32, training)
    row.seconds = round(time.process_time() - started, 1)
    return row


class _NeedsFloat32(Exception):
    pass


def _compare(case: str, row: Row, dtype: torch.dtype, training: bool) -> None:
    model = coverage_zoo.build(case).to(dtype)
    arguments = coverage_zoo.inputs(case, 2, dtype)
    row.precision = str(dtype).removeprefix("torch.")
    with torch.no_grad(), _Weights() as used:
        try:
            model(*copy.deepcopy(arguments))
        except RuntimeError as error:
            if dtype is torch.float64 and ("dtype" in str(error) or "type" in str(error)):
                raise _NeedsFloat32 from error
            raise
    plan = _plan(case, model, row, dtype)
    _account(model, plan, row, used.storages)
    if not plan.converted:
        row.precision = ""
        return
    dynamic = dyconvert.convert(model, plan)
    limit = FLOAT64 if dtype is torch.float64 else FLOAT32
    parts = _parts(model) if coverage_zoo.is_detection(case) else [""]
    if len(parts) > 1 and not _is_steady(model, arguments):
        parts.remove("")
        row.compared = "backbone and heads"
    row.difference = _difference(model, dynamic, arguments, parts, row)
    if not row.difference < limit:
        row.problems.append(f"outputs differ by {row.difference:.1e}")
    if training and row.parameters < coverage_zoo.LARGE and not coverage_zoo.is_detection(case):
        arguments = coverage_zoo.inputs(case, 3, dtype)
        model.train()
        dynamic.train()
        row.training = max(_difference(model, dynamic, arguments, [""], row), _buffers_apart(model, dynamic))
        if not row.training < (TRAINING if dtype is torch.float64 else 1e-2):
            row.problems.append(f"outputs differ by {row.training:.1e} in training mode")


def _plan(case: str, model: nn.Module, row: Row, dtype: torch.dtype) -> dyconvert.Plan:
    experts = 6 if row.parameters < coverage_zoo.LARGE else 3
    return dyconvert.plan(model, row.method, g=experts, example=coverage_zoo.example(case, dtype))


def _plan_only(case: str, row: Row) -> None:
    """On the meta device: planned and converted, and the converted model takes an input."""
    model = coverage_zoo.build_on_meta(case)
    row.precision = "planned"
    plan = _plan(case, model, row, torch.float32)
    _account(model, plan, row, set())
    if plan.converted:
        with torch.no_grad():
            dyconvert.convert(model, plan)(*(t.to("meta") for t in coverage_zoo.inputs(case, 1, torch.float32)))


def is_conv(module: nn.Module) -> bool:
    return isinstance(module, (nn.modules.conv._ConvNd, torchvision.ops.DeformConv2d))


def _account(model: nn.Module, plan: dyconvert.Plan, row: Row, used: set[int]) -> None:
    convs = {name: module for name, module in model.named_modules() if is_conv(module)}
    planned = {conv.name for conv in plan.convs}
    row.convs = len(convs)
    row.converted = len(plan.converted)
    row.skipped = plan.reasons()
    row.blocks = len(plan.blocks)
    row.own = sum(conv.block is None for conv in plan.converted)
    row.why_own = plan.notes()
    row.stems = row.skipped.get(STEM, 0)
    row.one_pixel = row.skipped.get(SEES_1X1, 0)
    if set(convs) != planned:
        row.problems.append(f"not in the plan, or not in the model: {sorted(set(convs) ^ planned)}")
    if unexplained := [conv.name for conv in plan.skipped if not conv.reason]:
        row.problems.append(f"skipped without a reason: {unexplained}")
    # A parameter that something else than a conv module convolves with.
    known = {convs[name].weight.untyped_storage().data_ptr() for name in convs}
    others = {
        name for name, p in model.named_parameters() if p.untyped_storage().data_ptr() in used - known and p.dim() > 2
    }
    if others:
        row.problems.append(f"convolved with outside of conv modules: {sorted(others)}")
    # On the meta device nothing can be shown on values: such rows say "planned".
    row.problems += [warning for warning in plan.warnings if row.precision != "planned" or "meta device" not in warning]


class _Weights(TorchFunctionMode):
    """The storages of the weights that convs are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: set[int] = set()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in CONVS:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            self.storages.add(weight.untyped_storage().data_ptr())
        return function(*args, **(kwargs or {}))


def _parts(model: nn.Module) -> list[str]:
    """A detection model and what it is made of, two levels deep: backbone, feature pyramid, heads."""
    return ["", *(name for name, m in model.named_modules() if name and name.count(".") < 2 and not is_conv(m))]


def _is_steady(model: nn.Module, arguments: tuple[Any, ...]) -> bool:
    """Whether a detection model returns the same boxes for images that differ by rounding.

    Boxes are ranked by scores, of which random weights make many nearly equal: which come first is then chance.
    """
    moved = ([image * (1 + 1e-13) for image in arguments[0]],)
    return _difference(model, model, arguments, [""], Row(""), moved) < FLOAT64


@contextmanager
def _outputs(model: nn.Module, parts: list[str]) -> Iterator[list[tuple[str, Tensor]]]:
    """Every tensor that the parts return, in the order of their calls."""
    found: list[tuple[str, Tensor]] = []

    def hook(name: str) -> Any:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            found.extend((name, leaf.clone()) for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor))

        return record

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in parts]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _difference(
    model: nn.Module,
    dynamic: nn.Module,
    arguments: tuple[Any, ...],
    parts: list[str],
    row: Row,
    others: tuple[Any, ...] | None = None,
) -> float:
    results = []
    for net, given in ((model, arguments), (dynamic, others or arguments)):
        torch.manual_seed(1)
        with torch.no_grad(), _outputs(net, parts) as found:
            net(*copy.deepcopy(given))
        results.append(found)
    first, second = results
    if [(name, t.shape) for name, t in first] != [(name, t.shape) for name, t in second]:
        row.problems.append("the outputs' shapes differ")
        return float("inf")
    if not any(t.numel() for _, t in first):
        row.problems.append("there was no output to compare")
    return max((_apart(a, b, row) for (_, a), (_, b) in zip(first, second, strict=True)), default=float("inf"))


def _apart(a: Tensor, b: Tensor, row: Row) -> float:
    if not a.numel():
        return 0.0
    a, b = a.double(), b.double()
    if not a.isfinite().all():
        row.problems.append("the static model's own outputs aren't finite")
    return ((a - b).abs().max() / a.abs().max().clamp(min=1e-30)).item()


def _buffers_apart(model: nn.Module, dynamic: nn.Module) -> float:
    """What a call in training mode left in the buffers, as a batch norm's statistics."""
    theirs = dict(dynamic.named_buffers())
    pairs = [(t.double(), theirs[name].double()) for name, t in model.named_buffers() if t.is_floating_point()]
    return (
        max(((a - b).abs().max() / a.abs().max().clamp(min=1e-30)).item() for a, b in pairs if a.numel())
        if pairs
        else 0.0
    )
