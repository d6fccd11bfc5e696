"""CPU latency of narrowed models against the originals: batch 1, 224 px, in turns.

    python benchmarks/narrow.py [--threads 2] [--g 6] [--repeats 40] [--compile] [--channels-last] [--json narrow.json]
        [MODEL ...]

Each model is timed as it was; narrowed and dynamic; the same, with batch norms fused and experts in float16
(``dyconvert.fuse(model, bank_dtype=torch.float16)``); and narrowed and static. Medians, with half the distance of the
quartiles. Weights are random, which changes no time.
"""

import argparse
import json
import platform
from functools import partial
from pathlib import Path
from typing import Any

import torch

import dyconvert
from dyconvert import models
from dyconvert.analysis.bench_model import prepare
from dyconvert.analysis.flops import macs, parameters
from dyconvert.analysis.timing import in_turns

# What DyNet's paper has: half of the channels; of MobileNetV2, 129 of 301 M multiply-adds.
NARROW = {"resnet50": {"width": 0.5}, "resnet18": {"width": 0.5}, "mobilenet_v2": {"flops": 129 / 300.8}}


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    original, _ = models.create(name, "none")
    images = torch.randn(arguments.batch, 3, arguments.size, arguments.size)
    how = NARROW.get(name, {"width": 0.5}) | {"example": images}
    dynamic = dyconvert.narrow(original, g=arguments.g, method=arguments.method, **how).eval()
    if arguments.tune:
        dyconvert.tune(dynamic, images)
    contestants = {
        "original": original,
        "dynamic": dynamic,
        "fused": dyconvert.fuse(dynamic, bank_dtype=torch.float16),
        "static": dyconvert.narrow(original, static=True, **how),
    }
    calculated = {key: macs(network, images[:1]) for key, network in contestants.items()}
    [(images,)] = prepare(
        contestants.values(), [(images,)], channels_last=arguments.channels_last, compiled=arguments.compile
    )
    with torch.inference_mode():
        calls = {key: partial(model.eval(), images) for key, model in contestants.items()}
        timings = in_turns(calls, arguments.repeats, seconds=arguments.seconds, cpu=arguments.cpu_time)
    return {
        "model": name,
        **{
            key: {
                "ms": 1e3 * timings[key].median,
                "spread_ms": 1e3 * (timings[key].high - timings[key].low) / 2,
                "disturbed": timings[key].disturbed,
                "macs": calculated[key],
                "parameters": parameters(model),
            }
            for key, model in contestants.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(NARROW))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--g", type=int, default=6)
    parser.add_argument("--method", default="dynet")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=60, help="no further round starts after so long")
    parser.add_argument("--cpu-time", action="store_true", help="with --threads 1, on a machine that is in use")
    parser.add_argument("--tune", action="store_true", help="choose kernels by measuring them first")
    parser.add_argument("--compile", action="store_true", help="torch.compile all of them: a minute each")
    parser.add_argument("--channels-last", action="store_true", help="weights and images in that format")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = []
    print(f"{'ms, times faster':18}{'MACs':>7}{'original':>14}{'dynamic':>21}{'fused, float16':>21}{'static':>21}")
    for name in arguments.models:
        result = measure(name, arguments)
        results.append(result)
        share = result["dynamic"]["macs"] / result["original"]["macs"]
        before = result["original"]
        cells = f"{name:18}{share:7.1%}{before['ms']:7.1f} +- {before['spread_ms']:3.1f}"
        for key in ("dynamic", "fused", "static"):
            found = result[key]
            cells += f"{found['ms']:8.1f} +- {found['spread_ms']:3.1f} {before['ms'] / found['ms']:4.2f}x"
        print(cells, flush=True)
    if arguments.json:
        about = {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}
        options = {key: value for key, value in vars(arguments).items() if key not in ("json", "models")}
        arguments.json.write_text(json.dumps(about | {"options": options, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
