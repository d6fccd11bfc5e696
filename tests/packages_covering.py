"""What happens to one model of a package in all that is done with a converted model: a row of `docs/coverage.md`."""

import copy
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import packages_zoo
import torch
from packages_zoo import tensors
from program_checks import NEGLIGIBLE, apart, copied, randomise, seed
from torch import Tensor, nn

import dyconvert
from dyconvert.marks import fused_of, plan_of

# Rounding alone; a conv left out or wired wrongly shows as 1e-3 and more.
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-3}
# Batch statistics over the few pixels of a small image divide by small variances, layer after layer.
TRAINING = {torch.float64: 1e-6, torch.float32: 2e-2}
# onnxruntime computes in float32.
ONNX = 1e-3
EXPERTS = 3


@dataclass
class Row:
    """One model's figures. Differences are relative to the largest number of what is compared.

    Attributes:
        case: `package:name`.
        parameters, convs: of the static model; modules that are convs, found without dyconvert.
        converted, skipped: how many become dynamic, and how many don't, by reason.
        blocks, own: blocks whose convs share a predictor; convs with one of their own.
        precision: "float64", or "float32" where the model makes float32 tensors itself.
        eval: of the outputs, at two batch sizes.
        alone: of an image's output alone and in a batch, with coefficients that follow the image; None where the static
            model's images depend on one another.
        training: of outputs, gradients, buffers in a training step.
        loaded: of the outputs of a changed model, saved and loaded onto one with other weights.
        fused, norms: of the outputs once batch norms are folded, and how many were.
        onnx: of onnxruntime's outputs from torch's, at a batch size that wasn't exported with.
        static_exports: where the converted model can't be exported with any batch size, whether the static one can.
        refused: what dyconvert's own error says where something can't be done, by what was done.
        seconds: of a processor.
        problems: what should not be.
    """

    case: str
    parameters: int = 0
    convs: int = 0
    converted: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    blocks: int = 0
    own: int = 0
    precision: str = ""
    eval: float | None = None
    alone: float | None = None
    training: float | None = None
    loaded: float | None = None
    fused: float | None = None
    norms: int = 0
    onnx: float | None = None
    static_exports: bool | None = None
    refused: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine(case: str) -> Row:
    """Convert a model, and do with the result what is done with a model."""
    row = Row(case)
    started = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dtype = torch.float64
        try:
            _run(packages_zoo.build(case).to(dtype), packages_zoo.inputs(case, 2, dtype))
        except RuntimeError as error:  # it makes float32 tensors of its own
            if "type" not in str(error):
                raise
            dtype = torch.float32
        _examine(case, row, dtype)
    row.seconds = round(time.process_time() - started, 1)
    return row


def _examine(case: str, row: Row, dtype: torch.dtype) -> None:
    model = packages_zoo.build(case).to(dtype)
    row.precision = str(dtype).removeprefix("torch.")
    row.parameters = sum(p.numel() for p in model.parameters())
    row.convs = sum(isinstance(m, nn.modules.conv._ConvNd) for m in model.modules())
    before = {name: t.clone() for name, t in model.state_dict().items()}

    def convert() -> nn.Module:
        plan = dyconvert.plan(model, "dynet", g=EXPERTS, example=packages_zoo.inputs(case, 2, dtype))
        row.converted, row.skipped, row.blocks = len(plan.converted), plan.reasons(), len(plan.blocks)
        row.own = sum(conv.block is None for conv in plan.converted)
        row.problems += plan.warnings
        if row.converted + len(plan.skipped) != len(plan.convs) or any(not conv.reason for conv in plan.skipped):
            row.problems.append("a conv is skipped without a reason")
        return dyconvert.convert(model, plan)

    dynamic = _tried("convert", row, convert)
    if any(not torch.equal(t, before[name]) for name, t in model.state_dict().items()):
        row.problems.append("the original was changed")
    if dynamic is None:
        return
    changed = copied(dynamic)
    randomise(changed, torch.Generator().manual_seed(1))
    for name, check in (
        ("eval", lambda: _eval(case, dtype, model, dynamic)),
        ("alone", lambda: _alone(case, dtype, model, changed)),
        ("loaded", lambda: _loaded(case, dtype, changed)),
        ("fused", lambda: _fused(case, dtype, changed, row)),
        ("training", lambda: _training(case, dtype, model, dynamic, row)),
    ):
        value = _tried(name, row, check)
        setattr(row, name, value)
        limit = (TRAINING if name == "training" else CLOSE)[dtype]
        if value is not None and not value < limit:
            row.problems.append(f"{name}: {value:.1e}")
    # Anew in float32: a model may have kept numbers of the other precision, as LeViT does.
    changed = dyconvert.convert(packages_zoo.build(case), plan_of(dynamic), check=False)
    randomise(changed, torch.Generator().manual_seed(1))
    changed.eval()
    row.onnx = _tried("onnx", row, lambda: _onnx(case, changed))
    if "onnx" in row.refused:
        row.static_exports = (
            _tried("static", Row(case), lambda: _exported(case, packages_zoo.build(case), True)) is not None
        )
        if row.static_exports:  # then with the batch size that it is to have
            row.onnx = _tried("onnx of one size", row, lambda: _onnx(case, changed, dynamic_batch=False))
    if row.onnx is not None and not row.onnx < ONNX:
        row.problems.append(f"onnx: {row.onnx:.1e}")


def _tried(name: str, row: Row, work: Callable[[], Any]) -> Any:
    """What `work` returns; None where dyconvert refuses, which is noted, or where anything else is raised."""
    try:
        return work()
    except dyconvert.DyconvertError as error:
        row.refused[name] = str(error)
    except Exception as error:
        row.problems.append(f"{name}: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}")
    return None


def _run(model: nn.Module, arguments: tuple[Any, ...]) -> list[Tensor]:
    seed()
    with torch.no_grad():
        return [t.detach().clone() for t in tensors(model(*copy.deepcopy(arguments)))]


def _furthest(first: list[Tensor], second: list[Tensor], least: float = 1e-30) -> float:
    if [t.shape for t in first] != [t.shape for t in second] or not sum(t.numel() for t in first):
        return float("inf")
    return max(apart(*_finite(_real(a), _real(b)), least) for a, b in zip(first, second, strict=True))


def _finite(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Without what isn't finite, alike in both, as a mask's infinities."""
    alike = ~a.isfinite() & ((a == b) | (a.isnan() & b.isnan()))
    return a.masked_fill(alike, 0), b.masked_fill(alike, 0)


def _real(t: Tensor) -> Tensor:
    return torch.view_as_real(t).double() if t.is_complex() else t.double()


def _eval(case: str, dtype: torch.dtype, model: nn.Module, dynamic: nn.Module) -> float:
    return max(_furthest(*(_run(net, packages_zoo.inputs(case, n, dtype)) for net in (model, dynamic))) for n in (3, 1))


def _alone(case: str, dtype: torch.dtype, model: nn.Module, changed: nn.Module) -> float | None:
    """With coefficients that differ from image to image, each image's output is as when it is run alone."""
    whole = packages_zoo.inputs(case, 3, dtype)

    def image(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[1:2]
        return [image(each) for each in value] if isinstance(value, list) else value

    found = []
    for net in (model, changed):
        together, alone = _run(net, whole), _run(net, tuple(map(image, whole)))
        pairs = [(a[1:2], b) for a, b in zip(together, alone, strict=True) if a.dim() and len(a) == 3 and len(b) == 1]
        found.append(_furthest([a for a, _ in pairs], [b for _, b in pairs]))
    return found[1] if found[0] < CLOSE[dtype] else None


def _loaded(case: str, dtype: torch.dtype, changed: nn.Module) -> float:
    with tempfile.TemporaryDirectory() as folder:
        dyconvert.save(changed, Path(folder) / "saved")
        loaded = dyconvert.load(Path(folder) / "saved", packages_zoo.build(case, seed=1).to(dtype))
    loaded.eval()
    return _furthest(*(_run(net, packages_zoo.inputs(case, 3, dtype)) for net in (changed, loaded)))


def _fused(case: str, dtype: torch.dtype, changed: nn.Module, row: Row) -> float:
    fused = dyconvert.fuse(changed, packages_zoo.inputs(case, 2, dtype))
    row.norms = len(fused_of(fused))
    return _furthest(*(_run(net, packages_zoo.inputs(case, 3, dtype)) for net in (changed, fused)))


def _training(case: str, dtype: torch.dtype, model: nn.Module, dynamic: nn.Module, row: Row) -> float | None:
    """Outputs, gradients and buffers of one step; then the dynamic model's optimizer takes it."""
    found = []
    for net in (model, dynamic):
        net.train()
        net.zero_grad(set_to_none=True)
        seed()
        try:
            outputs = [_real(t) for t in tensors(net(*packages_zoo.inputs(case, 3, dtype))) if t.requires_grad]
            if not outputs:
                return None
            weights = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t) for t in outputs]
            sum((t * w).sum() / t.numel() ** 0.5 for t, w in zip(outputs, weights, strict=True)).backward()
        except Exception:
            if net is model:
                return None  # the original can't be trained so
            raise
        found.append([t.detach() for t in outputs])
    furthest = _furthest(*found)
    theirs = {name: p.grad for name, p in dynamic.named_parameters()}
    predictor = next(m for m in dynamic.modules() if isinstance(m, dyconvert.CoefficientPredictor))
    for name, module in dynamic.named_modules():
        if isinstance(module, dyconvert.DynamicConv):
            for key in (f"{name}.weight", f"{name}.bias"):
                if theirs.get(key) is not None:
                    summed = theirs[key].unflatten(0, (module.g, -1)).sum(0)
                    theirs[key] = summed / (module.g * predictor.initial_coefficient)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    least = NEGLIGIBLE * max((g.abs().max().item() for g in gradients.values() if g.numel()), default=0.0)
    for name, gradient in gradients.items():
        other = theirs.get(name)
        other = torch.zeros_like(gradient) if other is None else other
        if (difference := _furthest([gradient], [other], least)) > furthest:
            furthest = difference
    buffers = dict(dynamic.named_buffers())
    for name, t in model.named_buffers():
        if t.is_floating_point() and t.numel():
            furthest = max(furthest, _furthest([t], [buffers[name]], 1e-6))
    moved = [p for p in dynamic.parameters() if p.grad is not None]
    before = [p.detach().clone() for p in moved]
    torch.optim.SGD(moved, lr=0.01).step()
    if not all(p.isfinite().all() for p in moved) or all(map(torch.equal, before, moved)):
        row.problems.append("training: a step left nothing changed, or made numbers that aren't finite")
    for net in (model, dynamic):
        net.eval()
    return furthest


def _onnx(case: str, model: nn.Module, dynamic_batch: bool = True) -> float:
    """How far onnxruntime's outputs are from torch's at a batch of three; exported with two where it may vary."""
    import onnxruntime

    wanted = _run(model, packages_zoo.inputs(case, 3))
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    content = _exported(case, model, dynamic_batch)
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    given = [t.numpy() for t in packages_zoo.inputs(case, 3)]
    found = session.run(None, dict(zip([each.name for each in session.get_inputs()], given, strict=True)))
    return _furthest(wanted, [torch.as_tensor(array) for array in found])


def _exported(case: str, model: nn.Module, dynamic_batch: bool) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        example = packages_zoo.inputs(case, 2 if dynamic_batch else 3)
        dyconvert.export_onnx(model, file, example, dynamic_batch=dynamic_batch)
        return file.read_bytes()
