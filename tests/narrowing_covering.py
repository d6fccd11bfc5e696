"""What narrowing does with one model, measured: a row of `docs/narrowing-coverage.md`."""

import copy
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import coverage_zoo
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map_only

import dyconvert
from dyconvert import DyconvertError
from dyconvert.analysis.flops import macs

# Calibration images, and those that the errors of this table are measured on.
IMAGES, FRESH = 40, 16
# Larger models are left out: least squares takes minutes for each.
TOO_LARGE = 45e6
# A share that is asked for is to be met exactly; this is only for printing.
WIDTH = 0.5


@dataclass
class Row:
    """One model's figures.

    Attributes:
        case: `library:name`.
        groups, narrowed: coupled groups of channels, and those of them that have fewer channels now.
        kept: why the others have all of theirs, with counts.
        macs: the share that is left at half the width; of multiply-adds.
        asked, met: the share that was asked for as a target, and what is left then.
        error, merged: of the outputs on fresh images, by least squares and by merging.
        init: where the weights came from in the end.
        layers, solved: layers whose weights could have been solved for, and those that were.
        refused: why it can't be narrowed at all, by name.
        seconds: of a processor.
        problems: what should not be.
    """

    case: str
    groups: int = 0
    narrowed: int = 0
    kept: dict[str, int] = field(default_factory=dict)
    macs: float | None = None
    asked: float | None = None
    met: float | None = None
    error: float | None = None
    merged: float | None = None
    init: str = ""
    layers: int = 0
    solved: int = 0
    refused: str = ""
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def cases() -> list[str]:
    """The smallest model of each of timm's modules that has convs, and of each of torchvision's."""
    found = []
    if coverage_zoo.is_installed("timm"):
        seen: dict[str, dict[str, Any]] = {}
        for entry in coverage_zoo.timm_families():
            if entry["module"] not in seen or entry["parameters"] < seen[entry["module"]]["parameters"]:
                seen[entry["module"]] = entry
        entries = sorted(seen.values(), key=coverage_zoo.timm_work)
        found += [f"timm:{e['model']}" for e in entries if e["parameters"] < TOO_LARGE]
    smallest: dict[str, str] = {}
    for case in coverage_zoo.names("torchvision"):
        if "quantized" not in case and coverage_zoo.parameters(case) < TOO_LARGE:
            family = torchvision.models.get_model_builder(case.partition(":")[2]).__module__
            if family not in smallest or coverage_zoo.parameters(case) < coverage_zoo.parameters(smallest[family]):
                smallest[family] = case
    return found + sorted(smallest.values(), key=coverage_zoo.parameters)


def arguments(case: str, count: int, seed: int) -> tuple[Any, ...]:
    """Images with something to see on large and small scales, so that outputs differ from image to image."""
    drawn = coverage_zoo.inputs(case, count, torch.float32, seed)
    generator = torch.Generator().manual_seed(seed + 1)

    def with_structure(t: Tensor) -> Tensor:
        if t.dim() < 3:
            return t
        maps = t if t.dim() > 3 else t[None]
        coarse = torch.randn(*maps.shape[:2], *(4 for _ in maps.shape[2:]), generator=generator)
        whole = torch.randn(*maps.shape[:2], *(1 for _ in maps.shape[2:]), generator=generator)
        made = 0.5 * maps + whole + F.interpolate(coarse, maps.shape[2:])
        return made if t.dim() > 3 else made[0]

    return tree_map_only(Tensor, with_structure, drawn)


def settled(model: nn.Module, given: tuple[Any, ...]) -> nn.Module:
    """Batch norms whose statistics are those of images, as a trained model's are."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = None
        norm.reset_running_stats()
        norm.train()
    if norms:
        with torch.no_grad():
            model(*copy.deepcopy(given))
    return model.eval()


def examine(case: str) -> Row:
    """Narrow a model by width and by target, and look at what comes out."""
    row = Row(case)
    started = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _examine(case, row)
        except DyconvertError as error:
            row.refused = str(error)
    row.seconds = round(time.process_time() - started, 1)
    return row


def _examine(case: str, row: Row) -> None:
    images, fresh = arguments(case, IMAGES, 0), arguments(case, FRESH, 100)
    model = settled(coverage_zoo.build(case), images)
    # What a loader gives: all tensors of the forward, or the images alone.
    several = sum(isinstance(value, Tensor) for value in images) > 1
    options = {"data": [images] if several or isinstance(images[0], list) else images[0], "static": True}
    options["example"] = tuple(value[:2] if isinstance(value, Tensor | list) else value for value in images)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    narrow = dyconvert.narrow(model, width=WIDTH, **options)
    if any(not torch.equal(t, before[name]) for name, t in model.state_dict().items()):
        row.problems.append("the original was changed")
    record = narrow.dyconvert_narrowing
    row.groups = len(record.groups)
    row.narrowed = sum(group.after < group.before for group in record.groups)
    for group in record.groups:
        if group.kept:
            row.kept[group.kept] = row.kept.get(group.kept, 0) + 1
    row.init, row.layers = record.init, len(record.layers)
    row.solved = sum(layer.weights == "least-squares" for layer in record.layers)
    one = options["example"]
    row.macs = macs(narrow, one) / macs(model, one)
    if abs(row.macs - record.macs) > 0.02:
        row.problems.append(f"the record says {record.macs:.3f} of the multiply-adds, {row.macs:.3f} are left")
    wanted = outputs(model, fresh)
    row.error = error(wanted, outputs(narrow, fresh))
    row.merged = error(wanted, outputs(dyconvert.narrow(model, width=WIDTH, init="merge", **options), fresh))
    if row.error is not None and row.merged is not None and not row.error <= row.merged * 1.01 + 1e-6:
        row.problems.append(f"least squares has an error of {row.error:.3g}, merging of {row.merged:.3g}")
    with tempfile.TemporaryDirectory() as folder:
        dyconvert.save(narrow, Path(folder) / "saved")
        again = dyconvert.load(Path(folder) / "saved", model)
    if any(not torch.equal(a, b) for a, b in zip(outputs(narrow, fresh), outputs(again, fresh), strict=True)):
        row.problems.append("it computes something else when it is saved and loaded")
    row.asked = round(min(max(0.5, row.macs + 0.05), 1.0), 2)
    target = dyconvert.narrow(model, flops=row.asked, init="merge", **{**options, "data": None})
    row.met = macs(target, one) / macs(model, one)
    said = any("more than the" in warning for warning in target.dyconvert_narrowing.warnings)
    if row.met > row.asked and not said:
        row.problems.append(f"{row.met:.3f} of the multiply-adds are left where {row.asked} was asked for")


@torch.no_grad()
def outputs(model: nn.Module, given: tuple[Any, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    made = tree_leaves(model(*copy.deepcopy(given)))
    return [t for t in made if isinstance(t, Tensor)]


def error(wanted: list[Tensor], found: list[Tensor]) -> float | None:
    """Mean square of the difference over the variance from image to image; the mean over the outputs."""
    if [t.shape for t in wanted] != [t.shape for t in found]:
        return None
    errors = []
    for a, b in zip(wanted, found, strict=True):
        if a.is_floating_point() and a.numel() and len(a) == FRESH and a.isfinite().all():
            a, b = a.double(), b.double()
            variance = (a - a.mean(0)).square().mean()
            if variance > 1e-12 * a.square().mean():
                errors.append(((a - b).square().mean() / variance).item())
    return sum(errors) / len(errors) if errors else None
