"""The tables of results in README and docs: kept as small CSVs in docs/results, from which everything is generated.

    dyconvert recipes sweep tiny-resnet8-table data.root=DIR model.weights=FILE --workers 2
    python benchmarks/results.py collect runs/tiny-resnet8-table   # its finished runs, to docs/results
    python benchmarks/results.py costs tiny-resnet8-table          # milliseconds and bytes, on an idle machine
    python benchmarks/results.py tables                            # README, docs and the figure; --check compares

`collect` takes what is finished so far, beside the rows of earlier sweeps: NAME.csv has a row for each run and seed,
NAME-curves.csv one for each epoch. Top-1 is that of the last epoch's weights on the validation images, which are the
10,000 test images of CIFAR-10; "training" is top-1 of the same weights on 10,000 training images, not augmented.
NAME is a sweep's; runs with other settings, such as fewer epochs, are kept under `SWEEP--WHAT-DIFFERS`.
"""

import argparse
import csv
import re
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
FIGURE = RESULTS / "accuracy.svg"

ROWS = ("run", "seed", "static", "epochs", "original", "converted", "top1", "training", "parameters", "macs", "seconds")
CURVES = ("run", "seed", "epoch", "loss", "top1")
COSTS = ("run", "milliseconds", "bytes", "original_milliseconds", "original_bytes")
# Tables of text between these are replaced.
MARK = re.compile(r"(<!-- results: ([\w.-]+) -->\n).*?(<!-- end of results -->)", re.DOTALL)
TRAINING_IMAGES = 10_000


# ---- The files ----


def read(name: str) -> list[dict[str, Any]]:
    """The rows of docs/results/NAME.csv, numbers as numbers; none if there is no such file."""
    file = RESULTS / f"{name}.csv"
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as stream:
        return [{key: _value(key, text) for key, text in row.items()} for row in csv.DictReader(stream)]


def write(name: str, columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> None:
    with (RESULTS / f"{name}.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: "" if row[key] is None else row[key] for key in columns} for row in rows)


def _value(key: str, text: str) -> Any:
    if key in ("run", "static"):
        return text == "True" if key == "static" else text
    return None if text == "" else float(text) if "." in text else int(text)


def sweep_of(name: str) -> str:
    return name.partition("--")[0]


def names() -> list[str]:
    """Of the sweeps with results."""
    return sorted(f.stem for f in RESULTS.glob("*.csv") if not f.stem.endswith(("-curves", "-costs")))


# ---- From a sweep's directory ----


def collect(directory: Path, name: str) -> None:
    """Add the finished runs of a sweep's directory, in place of what is there of the same runs and seeds."""
    from dyconvert.finetuning.sweeps.runner import read_rows

    rows = {(row["run"], row["seed"]): row for row in read(name)}
    curves = {(row["run"], row["seed"], row["epoch"]): row for row in read(f"{name}-curves")}
    for (run, seed), row in read_rows(directory / "sweep.csv").items():
        [place] = [path for path in directory.glob(f"*-seed{seed}") if _is_of(path, run)]
        kept = {key: row[key] for key in ("run", "seed", "static", "epochs", "original", "converted")}
        rows[run, seed] = kept | {
            "top1": round(row["finetuned"], 2),
            "training": _training(place),
            "parameters": int(row["parameters"]),
            "macs": row["macs"] and int(row["macs"]),
            "seconds": round(row["seconds"]),
        }
        for key in ("original", "converted"):
            rows[run, seed][key] = row[key] and round(row[key], 2)
        for point in _curve(place):
            curves[run, seed, point["epoch"]] = {"run": run, "seed": seed} | point
        print(f"{run}, seed {seed}: {row['finetuned']:.2f}")
    RESULTS.mkdir(exist_ok=True)
    write(name, ROWS, (rows[key] for key in sorted(rows)))
    write(f"{name}-curves", CURVES, (curves[key] for key in sorted(curves)))


def _is_of(directory: Path, run: str) -> bool:
    from dyconvert.finetuning.sweeps.schema import file_name

    return directory.name.rpartition("-seed")[0] == file_name(run)


def _curve(directory: Path) -> list[dict[str, Any]]:
    """Loss and top-1 of each epoch, counted from 1."""
    found: dict[int, dict[str, Any]] = {}
    with (directory / "metrics.csv").open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            point = found.setdefault(int(row["epoch"]) + 1, {"loss": None, "top1": None})
            if row.get("epoch_loss"):
                point["loss"] = round(float(row["epoch_loss"]), 4)
            if row.get("val_metric"):
                point["top1"] = round(float(row["val_metric"]), 2)
    return [{"epoch": epoch} | point for epoch, point in sorted(found.items()) if point["top1"] is not None]


def _training(directory: Path) -> float:
    """Top-1 of the last weights on training images, without augmentation."""
    import torch

    import dyconvert
    from dyconvert import load_recipe
    from dyconvert.finetuning.data.datasets import load_split
    from dyconvert.finetuning.data.loading import Prepared

    recipe = load_recipe(directory / "recipe.yaml", [f"data.limit_train={TRAINING_IMAGES}"])
    model = dyconvert.load(directory / "last").eval()
    prepared = Prepared(load_split(recipe, "train", 10, lambda line: None), 0, recipe.data, training=False)
    mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (recipe.data.mean, recipe.data.std))
    right = 0
    with torch.inference_mode():
        for start in range(0, len(prepared), 250):
            keys = [(0, position) for position in range(start, min(start + 250, len(prepared)))]
            images, targets = prepared.collate(prepared.__getitems__(keys))
            right += (model((images.float() / 255 - mean) / std).argmax(1) == targets).sum().item()
    return round(100 * right / len(prepared), 2)


# ---- What they cost ----


def costs(name: str, threads: int, seconds: float) -> None:
    """Milliseconds of one image, and bytes of the ONNX file, of every run's network and of its original."""
    import torch
    from torch import nn

    from dyconvert.analysis.timing import in_turns
    from dyconvert.exporting.export import export_onnx
    from dyconvert.finetuning.network import create_original, transform
    from dyconvert.finetuning.sweeps.schema import load_sweep
    from dyconvert.surgery.fuse import fuse

    torch.set_num_threads(threads)
    # Neither depends on the weights' values.
    sweep = load_sweep(sweep_of(name), ["model.weights=none", "distill=null", "dynamic.pair_spread=null"])
    networks: dict[tuple[str, str], nn.Module] = {}
    recipes = {run.name: sweep.recipe_of(run, 0, Path("runs")) for run in sweep.runs}
    for run, recipe in recipes.items():
        if recipe.narrow is not None:
            recipe = recipe.model_copy(update={"narrow": recipe.narrow.model_copy(update={"init": "merge"})})
        original, _ = create_original(recipe)
        networks["original", recipe.model.specifier] = fuse(original.eval())
        networks["run", run] = fuse(transform(original, recipe, lambda: iter(())).eval())
    image = torch.rand(1, *recipe.input_size)
    with torch.inference_mode():
        calls = {" ".join(key): partial(network, image) for key, network in networks.items()}
        times = in_turns(calls, repeats=1000, seconds=seconds)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "network.onnx"
        sizes = {key: export_onnx(net, file, image, dynamic_batch=False).bytes for key, net in networks.items()}

    def spent(*key: str) -> tuple[float, int]:
        return round(1000 * times[" ".join(key)].median, 3), sizes[key]

    rows = [
        dict(zip(COSTS, (run, *spent("run", run), *spent("original", recipe.model.specifier)), strict=True))
        for run, recipe in recipes.items()
    ]
    write(f"{name}-costs", COSTS, rows)


# ---- Tables ----


def table(name: str) -> str:
    """The table of a sweep in Markdown, the smaller networks first."""
    rows = read(name)
    if not rows:
        return f"No run of `{name}` is finished yet.\n"
    spent = {row["run"]: row for row in read(f"{name}-costs")}
    runs: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (row["original"], row["parameters"], row["run"], row["seed"])):
        runs.setdefault(row["run"], []).append(row)
    best = max(len(each) for each in runs.values())
    header = ["", "top-1", "over static", "training images", "parameters", "MACs", "ms", "kB, ONNX"]
    lines = [header, ["---", *["---:"] * (len(header) - 1)]]
    original = None
    for run, each in runs.items():
        if each[0]["original"] != original:
            original = each[0]["original"]
            timed = [spent[name] for name, rows in runs.items() if rows[0]["original"] == original and name in spent]
            lines.append(_original(original, next(iter(timed), None)))
        static = max(
            (_mean(other) for other in runs.values() if other[0]["static"] and other[0]["original"] == original),
            default=None,
        )
        cost = spent.get(run)
        few = "" if len(each) == best == 3 else f" ({len(each)} seed{'s' * (len(each) > 1)})"
        lines.append(
            [
                run + few,
                _spread([row["top1"] for row in each]),
                "" if static is None or each[0]["static"] else f"{_mean(each) - static:+.2f}",
                f"{statistics.fmean(row['training'] for row in each):.1f}",
                _count(each[0]["parameters"]),
                _count(each[0]["macs"]),
                f"{cost['milliseconds']:.2f}" if cost else "",
                f"{cost['bytes'] / 1000:.0f}" if cost else "",
            ]
        )
    epochs = ", ".join(str(each) for each in sorted({row["epochs"] for row in rows}))
    caption = f"{epochs} epochs, the last one's weights; mean and standard deviation over {best} seed{'s' * (best > 1)}"
    caption += ", where not said otherwise.\n" if len({len(each) for each in runs.values()}) > 1 else ".\n"
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines) + "\n" + caption


def _original(top1: float, cost: dict[str, Any] | None) -> list[str]:
    spent = [f"{cost['original_milliseconds']:.2f}", f"{cost['original_bytes'] / 1000:.0f}"] if cost else ["", ""]
    return ["original", f"{top1:.2f}", "", "", "", "", *spent]


def _mean(rows: list[dict[str, Any]]) -> float:
    return statistics.fmean(row["top1"] for row in rows)


def _spread(values: list[float]) -> str:
    mean = f"{statistics.fmean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def _count(value: int | None) -> str:
    if value is None:
        return ""
    return f"{value / 1e6:.2f} M" if value >= 1e6 else f"{value / 1e3:.2f} k"


def pages() -> dict[Path, str]:
    """Every page that has a table of results, as it should be."""
    texts = {page: page.read_text(encoding="utf-8") for page in PAGES}
    return {
        page: MARK.sub(lambda found: f"{found[1]}{table(found[2])}{found[3]}", text)
        for page, text in texts.items()
        if MARK.search(text)
    }


def figure() -> None:
    """Accuracy against milliseconds: originals, static and dynamic networks."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "dyconvert"  # the same file for the same results
    plt.rcParams["font.size"] = 9
    drawn, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
    kinds = {"original": ("k", "s"), "static": ("tab:gray", "o"), "dynamic": ("tab:blue", "D")}
    for name in names():
        spent = {row["run"]: row for row in read(f"{name}-costs")}
        runs: dict[str, list[dict[str, Any]]] = {}
        for row in read(name):
            runs.setdefault(row["run"], []).append(row)
        originals = set()
        for run, each in runs.items():
            if run not in spent:
                continue
            kind = "static" if each[0]["static"] else "dynamic"
            _point(axes, spent[run]["milliseconds"], _mean(each), run, kinds[kind], kind)
            originals.add((each[0]["original"], spent[run]["original_milliseconds"]))
        for top1 in {top1 for top1, _ in originals}:
            milliseconds = statistics.median(time for each, time in originals if each == top1)
            _point(axes, milliseconds, top1, "", kinds["original"], "original")
    axes.set(xlabel="milliseconds (one image, two threads)", ylabel="top-1, CIFAR-10 (%)")
    axes.set_xlim(0, 1.3 * axes.get_xlim()[1])  # from 0, and with room for names
    axes.grid(alpha=0.3)
    handles = {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    axes.legend(handles.values(), handles.keys(), frameon=False)
    drawn.savefig(FIGURE, metadata={"Date": None})
    plt.close(drawn)


def _point(axes: Any, x: float, y: float, text: str, style: tuple[str, str], label: str) -> None:
    axes.plot(x, y, style[1], color=style[0], markersize=5, label=label)
    axes.annotate(text, (x, y), xytext=(4, 3), textcoords="offset points", fontsize=6.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("collect", help="from a sweep's directory")
    collecting.add_argument("directory", type=Path)
    collecting.add_argument("--name", help="of the sweep, if the directory has another")
    measuring = commands.add_parser("costs", help="milliseconds and bytes of a sweep's networks")
    measuring.add_argument("name")
    measuring.add_argument("--threads", type=int, default=2)
    measuring.add_argument("--seconds", type=float, default=30.0)
    making = commands.add_parser("tables", help="README, docs, and the figure")
    making.add_argument("--check", action="store_true", help="change nothing; say which pages differ")
    arguments = parser.parse_args()
    if arguments.command == "collect":
        collect(arguments.directory, arguments.name or arguments.directory.resolve().name)
    elif arguments.command == "costs":
        costs(arguments.name, arguments.threads, arguments.seconds)
    else:
        different = [page for page, text in pages().items() if text != page.read_text(encoding="utf-8")]
        if arguments.check:
            sys.exit(f"Not as docs/results says: {', '.join(p.name for p in different)}" if different else 0)
        for page in different:
            page.write_text(pages()[page], encoding="utf-8")
        figure()


if __name__ == "__main__":
    main()
