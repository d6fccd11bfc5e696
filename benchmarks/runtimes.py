"""Latency of narrowed models in the runtimes that they are exported to, against the static originals.

    python benchmarks/runtimes.py [MODEL ...] [--threads 1 2] [--runtimes onnxruntime openvino executorch] [--g 6]
        [--cpu-time] [--files DIR] [--json docs/results/runtimes.json]

Batch 1, batch norms fused, the same runtime for the original and the dynamic model, float32, in turns. Medians, with
half the distance of the quartiles. Weights are random, which changes no time. Each file is checked against torch as it
is written. `--files` keeps the exported files, which take minutes, for the next time.

A runtime that isn't installed is left out; `pip install '.[narrow,onnx,openvino,executorch]'` brings all three.
"""

import argparse
import importlib.metadata
import json
import platform
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dyconvert
from dyconvert import models
from dyconvert.analysis.flops import macs
from dyconvert.analysis.timing import in_turns

# What is built of each original: DyNet's share of MobileNetV2's multiply-adds; the CIFAR ResNet at its own width and at
# half of it.
MODELS: dict[str, dict[str, dict[str, float]]] = {
    "mobilenet_v2": {"narrow": {"flops": 129 / 300.8}},
    "cifar-resnet20": {"narrow": {"width": 0.5}, "as wide": {}},
}


def _onnxruntime(file: Path, image: torch.Tensor, threads: int) -> Callable[[], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: image.numpy()}
    return lambda: session.run(None, given)


def _openvino(file: Path, image: torch.Tensor, threads: int) -> Callable[[], object]:
    import openvino

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        # Where the processor can, it would compute in bfloat16, and the other runtimes don't.
        "INFERENCE_PRECISION_HINT": openvino.Type.f32,
    }
    request = openvino.Core().compile_model(str(file), "CPU", settings).create_infer_request()
    given = [image.numpy()]
    return lambda: request.infer(given, share_inputs=True)


def _executorch(file: Path, image: torch.Tensor, threads: int) -> Callable[[], object]:
    from executorch.extension.pybindings import portable_lib
    from executorch.runtime import Runtime

    # One pool for the process, which its Python interface changes under this name only.
    portable_lib._unsafe_reset_threadpool(threads)
    program = Runtime.get().load_program(file.read_bytes())
    method = program.load_method("forward")
    # The method reads the program's bytes, and doesn't keep them.
    return lambda: (program, method.execute([image]))


RUNTIMES = {
    "onnxruntime": (dyconvert.export_onnx, ".onnx", _onnxruntime),
    "openvino": (dyconvert.export_openvino, ".xml", _openvino),
    "executorch": (dyconvert.export_executorch, ".pte", _executorch),
}


def built(name: str, g: int) -> tuple[dict[str, nn.Module], torch.Tensor]:
    """The original and what is made of it, fused; an image."""
    torch.manual_seed(0)
    original, _ = models.create(name, "none")
    image = torch.randn(1, 3, *((32, 32) if name.startswith("cifar") else (224, 224)))
    found = {"original": original.eval()}
    for label, how in MODELS[name].items():
        if how:
            found[label] = dyconvert.narrow(original, g=g, example=image, **how).eval()
        else:
            found[label] = dyconvert.convert(original, g=g, example=image).eval()
    return {label: dyconvert.fuse(model, image) for label, model in found.items()}, image


def exported(name: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Writes what isn't written yet; returns each model's multiply-adds, and each file's difference from torch."""
    about = folder / f"{name}-g{arguments.g}.json"
    known = json.loads(about.read_text()) if about.is_file() else {}
    if missing := [runtime for runtime in arguments.runtimes if runtime not in known]:
        contestants, image = built(name, arguments.g)
        known["macs"] = {label: macs(model, image) for label, model in contestants.items()}
        for runtime in missing:
            export, suffix, _ = RUNTIMES[runtime]
            known[runtime] = {
                label: export(model, folder / f"{name}-{label}{suffix}", image, dynamic_batch=False).difference
                for label, model in contestants.items()
            }
            about.write_text(json.dumps(known))
    return known


def measure(name: str, known: dict[str, Any], arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    labels = ["original", *MODELS[name]]
    image = torch.randn(1, 3, *((32, 32) if name.startswith("cifar") else (224, 224)))
    rows = []
    for runtime in arguments.runtimes:
        _, suffix, load = RUNTIMES[runtime]
        for threads in arguments.threads:
            calls = {label: load(folder / f"{name}-{label}{suffix}", image, threads) for label in labels}
            timings = in_turns(calls, arguments.repeats, arguments.seconds, cpu=arguments.cpu_time and threads == 1)
            base = timings["original"].median
            for label in labels:
                timing = timings[label]
                rows.append(
                    {
                        "model": name,
                        "form": label,
                        "runtime": runtime,
                        "threads": threads,
                        "clock": "cpu" if arguments.cpu_time and threads == 1 else "wall",
                        "ms": round(1e3 * timing.median, 4),
                        "spread_ms": round(1e3 * (timing.high - timing.low) / 2, 4),
                        "disturbed": round(timing.disturbed, 3),
                        "times_faster": round(base / timing.median, 3),
                        "macs": known["macs"][label],
                        "difference": known[runtime][label],
                    }
                )
                print(
                    f"{name:16}{label:10}{runtime:13}{threads:2} threads {1e3 * timing.median:9.3f} ms +- "
                    f"{rows[-1]['spread_ms']:6.3f} {rows[-1]['times_faster']:5.2f}x",
                    flush=True,
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), metavar="MODEL")
    parser.add_argument("--runtimes", nargs="+", default=list(RUNTIMES), choices=RUNTIMES)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--g", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=6, help="for one model, runtime and number of threads")
    parser.add_argument("--cpu-time", action="store_true", help="for one thread, on a machine that is in use")
    parser.add_argument("--files", type=Path, help="where the exported files are, or will be")
    parser.add_argument("--export-only", action="store_true", help="write the files and time nothing")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.models if name not in MODELS]:
        parser.error(f"there is no {unknown[0]!r} here; the models are {', '.join(MODELS)}")
    arguments.runtimes = [runtime for runtime in arguments.runtimes if find_spec(runtime)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.files or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        known = {name: exported(name, arguments, folder) for name in arguments.models}
        if arguments.export_only:
            return
        rows = [row for name in arguments.models for row in measure(name, known[name], arguments, folder)]
    if arguments.json:
        versions = {package: importlib.metadata.version(package) for package in ("torch", *arguments.runtimes)}
        about = {"versions": versions, "machine": _processor(), "g": arguments.g}
        arguments.json.write_text(json.dumps(about | {"results": rows}, indent=1) + "\n")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
