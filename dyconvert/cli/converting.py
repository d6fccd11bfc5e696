"""dyconvert convert: the work, and its report."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text
from torch import nn

from dyconvert import builtin, checkpoint, models
from dyconvert.analysis.flops import macs, parameters, tensor_bytes
from dyconvert.arguments import first_image
from dyconvert.cli.common import parse_device
from dyconvert.cli.narrowing import Options, print_narrowing
from dyconvert.cli.opening import example_of
from dyconvert.cli.progress import progress
from dyconvert.console import count, out, warn, write_json
from dyconvert.differences import Differences, verify
from dyconvert.errors import ModelError
from dyconvert.marks import compression_of, narrowing_of, plan_of
from dyconvert.methods import get_method
from dyconvert.models.preprocess import preprocessing_for
from dyconvert.surgery.blocks import check_convertible
from dyconvert.surgery.compress import compress as compress_model
from dyconvert.surgery.convert import convert as convert_model
from dyconvert.surgery.convert import plan as plan_model
from dyconvert.surgery.convert import preview
from dyconvert.surgery.plan import Plan

# float32's rounding, through the deepest models, stays well below.
TOLERANCE = 1e-4
_TITLES = {
    "parameters": "parameters",
    "macs": "MACs, one image",
    "bytes": "bytes of weights",
    "accuracy": "accuracy on 360 test digits",
}


@dataclass
class Request:
    """The model, as the command line names it.

    Attributes:
        specifier, weights, arguments: as `models.create` takes them.
        size: of its input, without the batch; None for the library's own.
        device: `--device`.
    """

    specifier: str
    weights: str
    arguments: dict[str, Any]
    size: tuple[int, ...] | None
    device: str | None

    def create(self, weights: str | None = None) -> tuple[nn.Module, "models.Source", tuple[Any, ...]]:
        """The static model on its device, where it came from, and two images for it."""
        device = parse_device(self.device)
        model, source = models.create(self.specifier, weights or self.weights, self.arguments)
        check_convertible(model)
        model.to(device)
        return model, source, example_of(model, source, self.size, 2)


def show_plan(request: Request, chosen: dict[str, Any], as_json: bool) -> None:
    """Print what would become of every conv."""
    # The plan doesn't depend on the library's weights, so they aren't downloaded for it.
    static, _, example = request.create("none" if request.weights == "default" else None)
    plan = plan_model(static, **chosen, example=example)
    if as_json:
        write_json(plan.model_dump(mode="json"))
        return
    out.print(plan.table())
    out.print()
    _print_plan(plan)
    _print_figures(_figures(static, preview(static, plan), example))
    out.print("\nDry run: nothing was written.")


def convert_and_save(
    request: Request,
    chosen: dict[str, Any],
    narrowing: Options,
    *,
    seed: int,
    compress: str | None,
    output: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Convert the model, compare it with the original, save it, and print a report."""
    started = time.perf_counter()
    with progress(f"loading {request.specifier}") as tell:
        # Errors that don't need the weights are found before they are loaded.
        destination = output or Path(_name(request.specifier, chosen, narrowing) + (f"-{compress}" if compress else ""))
        checkpoint.check_writable(destination, force=force)
        static, source, example = request.create()
        if narrowing.wanted:
            dynamic = narrowing.narrow(static, example, seed, tell, {} if narrowing.static else chosen)
            plan = plan_of(dynamic)
        else:
            plan = plan_model(static, **chosen, example=example)
            dynamic = convert_model(static, plan, seed=seed, progress=lambda _, *at: tell("converting", *at))
        seconds = time.perf_counter() - started
        tell("comparing the outputs", 0, None)
        differences = (verify if narrowing.wanted else _checked)(static, dynamic, example)
        figures = _figures(static, dynamic, example)
        if compress is not None:
            tell("compressing", 0, None)
            dynamic = compress_model(dynamic, compress, example)
            figures["bytes"] = [tensor_bytes(static), tensor_bytes(dynamic)]
        if source.specifier == "builtin:digits-resnet8":
            figures["accuracy"] = [builtin.accuracy(static.cpu()), builtin.accuracy(dynamic.cpu())]
        tell(f"saving to {destination}", 0, None)
        checkpoint.save(
            dynamic,
            destination,
            source=source,
            force=force,
            preprocessing=preprocessing_for(source),
            figures={_TITLES[name]: (before, after) for name, (before, after) in figures.items()},
        )
    if as_json:
        result = {
            "model": source.to_json(),
            "plan": plan and plan.model_dump(mode="json"),
            **narrowing.as_json(dynamic),
            "difference": {
                "relative": differences.relative,
                "absolute": differences.absolute,
                "numbers": differences.count,
            },
            **({"compression": packed.model_dump()} if compress and (packed := compression_of(dynamic)) else {}),
            "seconds": seconds,
            "output": str(destination),
            **figures,
        }
        write_json(result)
    else:
        _report(source, dynamic, plan, differences, figures, seconds, destination)


def _name(model: str, chosen: dict[str, Any], narrowing: Options) -> str:
    """The default name of the directory to save to."""
    method = get_method(chosen["method"], g=chosen["g"], scope=chosen["scope"])
    name = model.rpartition(":")[2].replace("/", "-") + narrowing.suffix
    return f"{name}-static" if narrowing.static else f"{name}-{method.name}-g{method.g}"


def _checked(static: nn.Module, dynamic: nn.Module, example: Any) -> Differences:
    differences = verify(static, dynamic, example)
    if differences.relative > TOLERANCE and verify(static, static, example).relative < differences.relative / 10:
        raise ModelError(
            f"The converted model does not compute what the original did: {differences}. Nothing was saved. "
            "Try --scope layer, or --exclude parts of the model, and please report it."
        )
    return differences


def _figures(static: nn.Module, dynamic: nn.Module, example: tuple[Any, ...]) -> dict[str, list[float]]:
    one = first_image(example)
    return {
        "parameters": [parameters(static), parameters(dynamic)],
        "macs": [macs(static, one), macs(dynamic, one)],
    }


def _report(
    source: "models.Source",
    model: nn.Module,
    plan: Plan | None,
    differences: Differences,
    figures: dict[str, Any],
    seconds: float,
    saved: Path,
) -> None:
    out.print(Text(source.specifier, style="bold"), f"weights: {source.weights or 'random'}")
    narrowing = narrowing_of(model)
    if narrowing is not None:
        print_narrowing(narrowing)
    if plan is not None:
        _print_plan(plan)
    _print_figures(figures)
    changed = narrowing is not None and any(group.before != group.after for group in narrowing.groups)
    if not changed:
        out.print(
            f"\nlargest difference {differences.relative:.1e} relative (allowed {TOLERANCE:g}), "
            f"{differences.absolute:.1e} absolute, of {differences.count:,} numbers"
        )
    else:
        out.print(f"\nlargest difference {differences.relative:.1e} relative, on random images: it needs fine-tuning")
    if compression := compression_of(model):
        out.print(str(compression))
    out.print(f"loaded and {'converted' if plan else 'narrowed'} in {seconds:.1f} s")
    out.print(f"saved to {saved}", soft_wrap=True)
    # A source that is code of the user's own runs only where they say so.
    trust = ", trust_code=True" if source.runs_user_code else ""
    command = f'python -c "import dyconvert; model = dyconvert.load({str(saved)!r}{trust})"'
    # On one line, however long: it is to be copied.
    out.print(f"\nNext: {command}", soft_wrap=True)


def _print_plan(plan: Plan) -> None:
    out.print(f"method {plan.method.name}, g = {plan.method.g}")
    out.print(Text(plan.summary()))
    for warning in plan.warnings:
        warn(warning)


def _print_figures(figures: dict[str, list[float]]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", "before", "after", ""):
        table.add_column(name, justify="right" if name else "left")
    for key, title in _TITLES.items():
        if key in figures:
            before, after = figures[key]
            if key == "accuracy":
                table.add_row(title, f"{before:.2f} %", f"{after:.2f} %")
            else:
                ratio = after / before if before else math.nan
                table.add_row(title, count(before), count(after), f"x {ratio:.2f}")
    out.print()
    out.print(table)
