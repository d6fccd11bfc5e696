"""What the kernels for CPUs reach on this processor, kept by its name, and the table of all processors.

    python benchmarks/kernels.py measure [PART ...] [--threads 2] [--repeats 9] [--cpu-time] [--about "an AMD EPYC"]
    python benchmarks/kernels.py tables

`measure` writes docs/results/kernels/PROCESSOR.json; each part replaces what was there of it, so that they may be
measured one after the other: layers, training, resnet50, mobilenet_v2, narrow. `tables` writes them into
docs/kernels.md. All figures are ratios of medians, measured in turns.
"""

import argparse
import json
import re
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

import dyconvert
from dyconvert import models
from dyconvert.analysis import bench_layer, bench_model, machine, timing
from dyconvert.nn import native_library

DOCS = Path(__file__).resolve().parents[1] / "docs"
RESULTS = DOCS / "results" / "kernels"
PAGE = DOCS / "kernels.md"
MARK = re.compile(r"(<!-- processors -->\n).*?(<!-- end of processors -->)", re.DOTALL)


def measure_layers(arguments: argparse.Namespace, *, training: bool = False) -> dict[str, Any]:
    """The layers of `dyconvert bench layers`, over static and against timm's."""
    read = timing.bandwidth(arguments.cpu_time)
    rows = []
    for batch in (1, 8) if training else (1, 8, 32):
        for layer in bench_layer.LAYERS:
            found = bench_layer.bench_layer(
                layer,
                batch,
                training=training,
                repeats=arguments.repeats,
                read=read,
                features=False,
                cpu=arguments.cpu_time,
            )
            base = found.static.median
            rows.append(
                {
                    "layer": found.layer,
                    "batch": batch,
                    "static_ms": 1e3 * base,
                    "ours": found.dynamic.median / base,
                    "spread": (found.dynamic.high - found.dynamic.low) / 2 / base,
                    "timm": found.timm and found.timm.median / base,
                    "limit": found.limit / base,
                }
            )
            print(rows[-1], flush=True)
    return {"rows": rows}


def measure_model(arguments: argparse.Namespace, name: str, batches: tuple[int, ...]) -> dict[str, Any]:
    """A converted model over the static one, as it is and compressed, in the same turns."""
    static, source = models.create(name, "none")
    dynamic = dyconvert.convert(static.eval(), g=6).eval()
    small = dyconvert.compress(dynamic, "int8", check=False)
    rows = []
    for batch in batches:
        example = torch.randn(batch, *source.input_size)
        found = bench_model.bench_model(
            static, dynamic, example, other=small, repeats=arguments.repeats, cpu=arguments.cpu_time
        )
        base = found.static.median
        rows.append(
            {
                "batch": batch,
                "static_ms": 1e3 * base,
                "ours": found.dynamic.median / base,
                "spread": (found.dynamic.high - found.dynamic.low) / 2 / base,
                "int8": found.other.median / base,
                "int8_spread": (found.other.high - found.other.low) / 2 / base,
            }
        )
        print(name, rows[-1], flush=True)
    return {"rows": rows}


def measure_narrow(arguments: argparse.Namespace) -> dict[str, Any]:
    """The narrowed models of benchmarks/narrow.py, times faster than the originals."""
    import narrow

    options = argparse.Namespace(
        batch=1,
        size=224,
        g=6,
        method="dynet",
        repeats=2 * arguments.repeats,
        seconds=15,
        cpu_time=arguments.cpu_time,
        tune=False,
        compile=False,
        channels_last=False,
    )
    rows = []
    for name in narrow.NARROW:
        found = narrow.measure(name, options)
        rows.append(
            {"model": name}
            | {key: found["original"]["ms"] / found[key]["ms"] for key in ("dynamic", "fused", "static")}
            | {"spread": found["dynamic"]["spread_ms"] / found["dynamic"]["ms"]}
        )
        print(rows[-1], flush=True)
    return {"rows": rows}


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "layers": measure_layers,
    "training": lambda arguments: measure_layers(arguments, training=True),
    "resnet50": lambda arguments: measure_model(arguments, "resnet50", (1, 8)),
    "mobilenet_v2": lambda arguments: measure_model(arguments, "mobilenet_v2", (1, 32)),
    "narrow": measure_narrow,
}


def measure(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    processor = machine.processor()
    file = RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', processor.lower()).strip('-')}.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    found |= {"processor": processor, "kernels": native_library.target()}
    if arguments.about:
        found["about"] = arguments.about
    RESULTS.mkdir(parents=True, exist_ok=True)
    for part in arguments.parts or PARTS:
        conditions = {
            "date": date.today().isoformat(),
            "torch": torch.__version__,
            "threads": arguments.threads,
            "cpu_time": arguments.cpu_time,
        }
        found[part] = conditions | PARTS[part](arguments)
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(file)


def bars(found: dict[str, Any]) -> dict[str, str]:
    """What the table says of one processor."""

    def rows(part: str) -> list[dict[str, Any]]:
        return found.get(part, {}).get("rows", [])

    def by(part: str, **wanted: Any) -> dict[str, Any] | None:
        return next((row for row in rows(part) if all(row[key] == value for key, value in wanted.items())), None)

    def against_timm(part: str) -> str:
        ratios = [row["timm"] / row["ours"] for row in rows(part) if row["timm"]]
        return f"{timing.geometric_mean(ratios):.2f}; {min(ratios):.2f}" if ratios else "-"

    def one(part: str, key: str, batch: int) -> str:
        row = by(part, batch=batch)
        spread = {"ours": "spread", "int8": "int8_spread"}[key]
        return f"{row[key]:.2f} ± {row[spread]:.2f}" if row else "-"

    large = sorted((row["ours"], row["layer"], row["batch"]) for row in rows("layers") if row["batch"] > 1)
    above = [each for each in large if each[0] > 1.3]
    worst = "-"
    if large:
        ratio, layer, batch = large[-1]
        worst = f"{ratio:.2f} ({layer}, batch {batch}); {len(above)} of {len(large)} above 1.3"
    narrow = ", ".join(f"{row['dynamic']:.2f}" for row in rows("narrow"))
    fused = ", ".join(f"{row['fused']:.2f}" for row in rows("narrow"))
    return {
        "layers, times faster than timm's, inference: geometric mean; worst": against_timm("layers"),
        "the same, a training step": against_timm("training"),
        "layers over static at batch 8 and 32: the worst": worst,
        "ResNet50, g = 6, over static, batch 1": one("resnet50", "ours", 1),
        "the same, batch 8": one("resnet50", "ours", 8),
        "ResNet50, int8, batch 1": one("resnet50", "int8", 1),
        "ResNet50, int8, batch 8": one("resnet50", "int8", 8),
        "MobileNetV2, g = 6, over static, batch 1": one("mobilenet_v2", "ours", 1),
        "the same, batch 32": one("mobilenet_v2", "ours", 32),
        "MobileNetV2, int8, batch 1": one("mobilenet_v2", "int8", 1),
        "narrowed ResNet50, ResNet18, MobileNetV2, times faster than the original": narrow or "-",
        "the same, fused, experts in float16": fused or "-",
    }


def _conditions(found: dict[str, Any]) -> str:
    """How the parts were measured, each way once."""
    parts = [found[part] for part in PARTS if part in found]
    kinds = {(part["threads"], "CPU" if part["cpu_time"] else "wall") for part in parts}
    return ", ".join(f"{threads} thread{'s' * (threads > 1)}, {clock} time" for threads, clock in sorted(kinds))


def tables() -> None:
    """Write the table of all processors into the page."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob("*.json"))]
    columns = [bars(each) for each in found]
    names = [f"{each.get('about') or each['processor']} ({each['kernels']}); {_conditions(each)}" for each in found]
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---|" * len(found)]
    lines += ["| " + " | ".join([title, *(column[title] for column in columns)]) + " |" for title in columns[0]]
    text = PAGE.read_text(encoding="utf-8")
    table = "\n".join(lines)
    PAGE.write_text(MARK.sub(lambda mark: f"{mark[1]}{table}\n{mark[2]}", text), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("measure", "tables"))
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--cpu-time", action="store_true", help="with --threads 1, on a machine that is in use")
    parser.add_argument("--about", help="what the processor is, where its name doesn't say it")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - PARTS.keys():
        parser.error(f"there is no part {', '.join(sorted(unknown))}; the parts are {', '.join(PARTS)}")
    measure(arguments) if arguments.command == "measure" else tables()


if __name__ == "__main__":
    main()
