"""Checks and measures everything on a GPU: one command, under eight minutes.

`python benchmarks/gpu.py` (a table on the screen, and the figures in `gpu.json`)

1. tests: every `pytest -m cuda`.
2. layers: single convs, each strategy beside the static conv, timm's `CondConv2d` and mixing feature maps.
3. models: whole networks against their static originals, and timm's EfficientNet with CondConv against ours.
4. recipes: a step of each shipped recipe at its own batch, in parts as large as the memory takes.

Time is the wall clock's between synchronisations, memory the peak that torch's allocator saw above what was there
before. Last come the bars that the project set itself. `--device cpu --quick` runs all of it on small sizes, so that no
line is run for the first time when a GPU is there.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn

import dyconvert
from dyconvert import models
from dyconvert.analysis.bench_layer import LAYERS, Layer, layer_calls
from dyconvert.analysis.timing import geometric_mean
from dyconvert.methods import get_method
from dyconvert.nn import choice, engines
from dyconvert.nn.dispatch import force
from dyconvert.nn.measured_choices import Choices, environment, out_of_memory

PARTS = ("tests", "layers", "models", "recipes")
# Seconds of the whole that each part may take at most; what isn't reached is named.
SHARES = {"tests": 150, "layers": 140, "models": 110, "recipes": 60}
HERE = Path(__file__).resolve().parent
console = Console(width=None if sys.stdout.isatty() else 160)


class Figure(NamedTuple):
    """Seconds a call, and bytes above what was allocated before."""

    seconds: float
    memory: int

    def __str__(self) -> str:
        return f"{self.seconds * 1e3:.3f} ms" + (f" {self.memory / 2**20:.0f} MiB" if self.memory else "")


class Run:
    """One run of this command: where it runs, how long it may, and what it found."""

    def __init__(self, device: torch.device, quick: bool) -> None:
        self.device = device
        self.quick = quick
        self.found: dict[str, Any] = {}
        self.errors: list[str] = []
        self.left_out: list[str] = []
        self._until = math.inf

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """An error in one part is noted, and the next part runs."""
        self._until = time.monotonic() + SHARES[name]
        began = time.monotonic()
        try:
            yield
        except Exception:
            self.error(name)
        console.print(f"[dim]{name}: {time.monotonic() - began:.0f} s[/dim]")

    def late(self, what: str) -> bool:
        """Whether a part's time is over; what is left out then is noted."""
        if time.monotonic() < self._until:
            return False
        self.left_out.append(what)
        return True

    def error(self, what: str) -> None:
        self.errors.append(f"{what}: {traceback.format_exc(limit=-3)}")
        console.print(f"[red]{what} failed[/red]: {sys.exc_info()[1]}", markup=True, highlight=False)

    def measure(self, calls: dict[str, Callable[[], object]], what: str) -> dict[str, Figure]:
        """Every call's time, in turns, and its peak memory; those that run out of memory are left out."""
        figures: dict[str, Figure] = {}
        runs: dict[str, list[float]] = {}
        peaks: dict[str, int] = {}
        for name, call in calls.items():
            try:
                call()  # compiles, measures strategies, finds memory
                peaks[name] = self._peak(call)
                runs[name] = []
            except Exception as error:
                if not out_of_memory(error):
                    self.error(f"{what}: {name}")
                else:
                    self.left_out.append(f"{what}: {name} (out of memory)")
                self._empty()
        for _ in range(1 if self.quick else 5):
            for name in runs:
                runs[name].append(self._block(calls[name]))
        for name, times in runs.items():
            figures[name] = Figure(statistics.median(times), peaks[name])
        self._empty()
        return figures

    def _block(self, call: Callable[[], object]) -> float:
        """Seconds a call, over about 20 milliseconds."""
        count, took = 1, 0.0
        while True:
            self._synchronize()
            start = time.perf_counter()
            for _ in range(count):
                call()
            self._synchronize()
            took = time.perf_counter() - start
            if took > 0.02 or count >= 64 or self.quick:
                return took / count
            count *= 4

    def _peak(self, call: Callable[[], object]) -> int:
        if self.device.type != "cuda":
            call()
            return 0
        self._synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        self._synchronize()
        return torch.cuda.max_memory_allocated() - before

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def _empty(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def tests(run: Run) -> None:
    """`pytest -m cuda`, in a process of its own: what breaks a CUDA context would break what follows."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-n", "0", "-p", "no:cacheprovider"]
        command += [
            f"--junitxml={report}",
            f"--rootdir={HERE.parent}",
            f"--config-file={HERE.parent / 'pyproject.toml'}",
        ]
        if run.quick:  # one of each kind
            command += ["-k", "not inductor and not triton_128 and not triton_fused"]
        environment = os.environ | ({} if run.device.type == "cuda" else {"DYCONVERT_TEST_DEVICE": run.device.type})
        try:
            done = subprocess.run(
                [*command, HERE.parent / "tests"],
                env=environment,
                capture_output=True,
                text=True,
                timeout=SHARES["tests"],
            )
            said = done.stdout
        except subprocess.TimeoutExpired as error:
            said = (error.stdout or b"").decode(errors="replace")
            run.left_out.append(f"tests after {SHARES['tests']} s")
        if not report.exists():
            run.errors.append(f"tests: pytest wrote no report. It said:\n{said[-4000:]}")
            return
        suite = ElementTree.parse(report).getroot()[0]
        counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
        for case in suite.iter("testcase"):
            for problem in (*case.findall("failure"), *case.findall("error")):
                run.errors.append(f"{case.get('name')}: {(problem.get('message') or '')[:500]}")
    run.found["tests"] = counts
    console.print(", ".join(f"{count} {name}" for name, count in counts.items()))
    if not counts["tests"] - counts["skipped"]:
        run.errors.append("tests: none ran")


def layers(run: Run) -> None:
    """Single convs. On a GPU in the dtype and format that training there has, and in float32."""
    quick_layers = (Layer(8, 16, 3, 6), Layer(8, 8, 3, 6, groups=8), Layer(16, 8, 1, 6))
    half = (torch.float16, True)
    settings = [(64, *half, True), (1, *half, False), (64, *half, False), (64, torch.float32, False, True)]
    if run.quick:
        settings = [(2, torch.float32, False, False), (2, torch.bfloat16, True, True)]
    rows = []
    names = ("static", "dynamic", "timm", "features", *engines.ENGINES)
    short = {name: name.replace("recompute_", "").replace("triton_", "tri") for name in names}
    columns = ("layer", "batch", "dtype", "mode", *short.values(), "chosen", "MiB")
    title = "Layers, g = 6: times over the static conv's, its own in ms; memory of what was chosen"
    table = Table(*columns, title=title, box=None)
    for batch, dtype, last, training in settings:
        for layer in quick_layers if run.quick else LAYERS:
            mode = "training" if training else "inference"
            what = f"{layer.label} batch {batch} {str(dtype)[6:]} {mode}"
            if run.late(what):
                continue
            method = get_method("condconv", g=6)
            calls = layer_calls(layer, batch, method, training, device=run.device, dtype=dtype, channels_last=last)
            before = set(choice.current().items())  # what was chosen for other shapes
            calls |= {name: _forced(name, calls["dynamic"]) for name in engines.ENGINES if _can(run, name, dtype)}
            figures = run.measure(calls, what)
            new = [found for key, found in choice.current().items().items() if key not in before]
            chosen = new[-1].strategy if new else "by rule"
            base = figures["static"].seconds if "static" in figures else math.nan
            cells = [f"{figures[n].seconds / base:.2f}" if n in figures else "-" for n in names[1:]]
            memory = f"{figures['dynamic'].memory / 2**20:.0f}" if "dynamic" in figures else "-"
            table.add_row(layer.label, str(batch), str(dtype)[6:], mode, f"{base * 1e3:.3f}", *cells, chosen, memory)
            rows.append({"layer": layer.label, "batch": batch, "dtype": str(dtype), "channels_last": last, "mode": mode,
                         "chosen": chosen, "figures": {n: f._asdict() for n, f in figures.items()}})  # fmt: skip
    run.found["layers"] = rows
    console.print(table)


def _forced(name: str, call: Callable[[], object]) -> Callable[[], object]:
    def forced() -> object:
        with force(name):
            return call()

    return forced


def _can(run: Run, name: str, dtype: torch.dtype) -> bool:
    """Triton's interpreter is for tests."""
    return name not in engines.triton.TILES or run.device.type == "cuda"


def models_(run: Run) -> None:
    """Whole networks, under autocast to float16 with channels last, as one trains and serves on a GPU."""
    cases = [  # model, method, g, options, other model, batches
        ("torchvision:resnet50", "dynet", 6, {}, None),
        ("torchvision:mobilenet_v2", "dynet", 6, {}, None),
        (
            "timm:efficientnet_b0",
            "condconv",
            4,
            {"include": "blocks.[456].*.conv_[pd]*"},
            "timm:tf_efficientnet_cc_b0_4e",
        ),
    ]
    size, settings = 224, [(1, False), (64, False), (64, True)]
    if run.quick:
        cases = [("builtin:digits-resnet8", "dynet", 6, {}, None)]
        size, settings = 8, [(2, False), (2, True)]
    table = Table("model", "batch", "mode", "static", "ours / static", "memory", "other / static", title="Whole models")
    rows = []
    for name, method, g, options, against in cases:
        static, _ = models.create(name, "none", {})
        networks = {"static": static, "ours": dyconvert.convert(static, method=method, g=g, **options)}
        if against is not None:
            networks["other"] = models.create(against, "none", {})[0]
        for network in networks.values():
            network.to(run.device, memory_format=torch.channels_last)
        channels = 1 if run.quick else 3
        for batch, training in settings:
            mode = "training" if training else "inference"
            what = f"{name} batch {batch} {mode}"
            if run.late(what):
                continue
            x = torch.randn(batch, channels, size, size, device=run.device)
            x = x.contiguous(memory_format=torch.channels_last)
            calls = {key: _step(run, network, x, training) for key, network in networks.items()}
            if batch == 1 and run.device.type == "cuda":
                calls |= {f"{key}, graph": _graphed(networks[key], x) for key in ("static", "ours")}
            figures = run.measure(calls, what)
            rows.append({"model": name, "batch": batch, "mode": mode,
                         "figures": {key: f._asdict() for key, f in figures.items()}})  # fmt: skip
            if "static" not in figures:
                continue
            base, ours = figures["static"], figures.get("ours")
            ratio = f"{ours.seconds / base.seconds:.2f}" if ours else "-"
            memory = f"{ours.memory / base.memory:.2f}" if ours and base.memory else "-"
            other = f"{figures['other'].seconds / base.seconds:.2f}" if "other" in figures else "-"
            table.add_row(name, str(batch), mode, str(base), ratio, memory, other)
            if {"ours, graph", "static, graph"} <= set(figures):
                graph, plain = figures["ours, graph"], figures["static, graph"]
                table.add_row(
                    name, "1", "as a CUDA graph", str(plain), f"{graph.seconds / plain.seconds:.2f}", "-", "-"
                )
        del networks, static
    run.found["models"] = rows
    console.print(table)


def _step(run: Run, network: nn.Module, x: torch.Tensor, training: bool) -> Callable[[], None]:
    dtype = torch.float16 if run.device.type == "cuda" else torch.bfloat16

    def step() -> None:
        network.train(training)
        network.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(training), torch.autocast(run.device.type, dtype):
            out = network(x)
            loss = out.float().square().mean()
        if training:
            loss.backward()

    return step


def _graphed(network: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """Inference as a CUDA graph: what is left when the calls cost nothing."""
    network.eval()
    state: list[torch.cuda.CUDAGraph] = []

    def replay() -> None:
        if not state:
            with torch.no_grad(), torch.autocast("cuda", torch.float16, cache_enabled=False):
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    for _ in range(3):
                        network(x)
                torch.cuda.current_stream().wait_stream(stream)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    network(x)
                state.append(graph)
        state[0].replay()

    return replay


def recipes(run: Run) -> None:
    """A step of each shipped recipe at its own batch, with its distillation, optimizer and precision."""
    from dyconvert.finetuning.recipes.shipped import shipped_recipes

    table = Table("recipe", "batch", "at a time", "a step", "images/s", title="A step of each shipped recipe")
    rows = []
    names = list(shipped_recipes())
    for name in ("quickstart", "cifar10-resnet20") if run.quick else names:
        if run.late(f"recipe {name}"):
            continue
        try:
            row = _recipe_step(run, name)
        except Exception:
            run.error(f"recipe {name}")
            continue
        rows.append(row)
        step = Figure(row["seconds"], row["memory"])
        table.add_row(name, str(row["batch"]), str(row["at a time"]), str(step), f"{row['batch'] / step.seconds:.0f}")
    run.found["recipes"] = rows
    console.print(table)


def _recipe_step(run: Run, name: str) -> dict[str, Any]:
    from dyconvert.finetuning.network import create_original, transform
    from dyconvert.finetuning.recipes.recipe import load_recipe
    from dyconvert.finetuning.training.optim import make_optimizer
    from dyconvert.finetuning.training.outputs import outputs_of
    from dyconvert.finetuning.training.teacher import distillation

    recipe = load_recipe(name, ["model.weights=none", "data.dataset=fake"])
    original, _ = create_original(recipe)
    student = transform(original, recipe).to(run.device).train()
    original.to(run.device).eval().requires_grad_(False)
    form = torch.channels_last if recipe.train.channels_last else torch.contiguous_format
    student.to(memory_format=form)
    optimizer = make_optimizer(student, recipe.train, recipe.dynamic)
    kinds = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
    dtype = kinds.get(recipe.train.precision)
    if run.device.type == "cpu" and dtype is not None:
        dtype = torch.bfloat16
    scaler = torch.amp.GradScaler(run.device.type, enabled=dtype == torch.float16)
    batch = 4 if run.quick else recipe.train.batch
    at_a_time = batch

    def step() -> None:
        optimizer.zero_grad()
        for _ in range(batch // at_a_time):
            x = torch.randn(at_a_time, *recipe.input_size, device=run.device).contiguous(memory_format=form)
            with torch.autocast(run.device.type, dtype) if dtype else nullcontext():
                logits = next(outputs_of(student(x)))
                targets = torch.zeros_like(logits[:, 0], dtype=torch.long)
                loss = F.cross_entropy(logits.float(), targets)
                if recipe.distill is not None:
                    with torch.no_grad():
                        taught = next(outputs_of(original(x)))
                    loss = loss + distillation(logits, taught, recipe.distill.temperature)
            scaler.scale(loss * at_a_time / batch).backward()
        scaler.step(optimizer)
        scaler.update()

    while True:
        try:
            step()
            break
        except Exception as error:
            if not out_of_memory(error) or at_a_time % 2:
                raise
            at_a_time //= 2
            run._empty()
    memory = run._peak(step)
    seconds = statistics.median(_timed(run, step) for _ in range(1 if run.quick else 3))
    return {"recipe": name, "batch": batch, "at a time": at_a_time, "seconds": seconds, "memory": memory}


def _timed(run: Run, call: Callable[[], None]) -> float:
    run._synchronize()
    start = time.perf_counter()
    call()
    run._synchronize()
    return time.perf_counter() - start


def bars(found: dict[str, Any]) -> list[tuple[str, float, float]]:
    """What was asked, what was found, and the most that was asked for."""
    rows = []
    for batch, mode, most in ((1, "inference", 1.5), (64, "inference", 1.5), (64, "training", 2.0)):
        for row in found.get("models", ()):
            figures = row["figures"]
            if (row["model"], row["batch"], row["mode"]) != (
                "torchvision:resnet50",
                batch,
                mode,
            ) or "ours" not in figures:
                continue
            ours, static = figures["ours"], figures["static"]
            rows.append((f"ResNet50 g = 6, {mode}, batch {batch}: time", ours["seconds"] / static["seconds"], most))
            if mode == "training" and static["memory"]:
                rows.append((f"ResNet50 g = 6, {mode}, batch {batch}: memory", ours["memory"] / static["memory"], 1.3))
    against = [
        row["figures"]["dynamic"]["seconds"] / row["figures"]["timm"]["seconds"]
        for row in found.get("layers", ())
        if "timm" in row["figures"] and "dynamic" in row["figures"]
    ]
    if against:
        rows.append((f"layers over timm's, geometric mean of {len(against)}", geometric_mean(against), 0.5))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, mps, xpu or cpu")
    parser.add_argument("--quick", action="store_true", help="small sizes, once: whether everything runs")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="some of the parts")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="where the figures go")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("There is no CUDA device here. `--device cpu --quick` shows that the command itself runs.")
    began = time.monotonic()
    run = Run(device, arguments.quick)
    console.print(" ".join(environment(device)), highlight=False)
    steps = {"tests": tests, "layers": layers, "models": models_, "recipes": recipes}
    # What is measured here is neither read from the user's cache nor written to it; a CPU plays a GPU.
    with choice.using(Choices(cpu=True)):
        for name in arguments.only:
            with run.part(name):
                steps[name](run)
    verdicts = bars(run.found)
    table = Table("bar", "found", "at most", "", title="Bars")
    for name, value, most in verdicts:
        held = "held" if value <= most else "[red]missed[/red]"
        table.add_row(name, f"{value:.2f}", f"{most:.2f}", "means nothing" if arguments.quick else held)
    if verdicts:
        console.print(table)
    for line in run.left_out:
        console.print(f"left out: {line}", highlight=False, markup=False)
    for line in run.errors:
        console.print(f"error: {line}", highlight=False, markup=False)
    report = {
        "environment": environment(device),
        "quick": arguments.quick,
        "seconds": time.monotonic() - began,
        **run.found,
        "bars": [{"bar": name, "found": value, "at most": most} for name, value, most in verdicts],
        "left out": run.left_out,
        "errors": run.errors,
    }
    arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    console.print(f"{time.monotonic() - began:.0f} s; figures in {arguments.json}", highlight=False)
    sys.exit(1 if run.errors else 0)


if __name__ == "__main__":
    main()
