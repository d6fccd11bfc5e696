"""What a conversion costs: its time against copying the weights g times, and its peak memory.

    python benchmarks/convert.py [--model resnet50] [--g 6] [--repeats 7]

Time: dyconvert.convert, planning included, and `weight.repeat(g, ...)` over all of the model's convs, in turns:
in one process, where memory is used again, and as the first thing in fresh processes, where it comes from the
system. Memory: the highest resident set of a process that converts, less that of one that doesn't, against the
bytes of the original and of the result.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time

import torch
from torch import nn

import dyconvert
from dyconvert import models


def size(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def times(model: nn.Module, method: str, g: int, repeats: int) -> tuple[list[float], list[float]]:
    weights = [m.weight.detach() for m in model.modules() if isinstance(m, nn.Conv2d)]
    converting, copying = [], []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        copies = [w.repeat(g, *[1] * (w.dim() - 1)) for w in weights]
        copying.append(time.perf_counter() - start)
        del copies
        start = time.perf_counter()
        dynamic = dyconvert.convert(model, method=method, g=g)
        converting.append(time.perf_counter() - start)
        del dynamic
    return converting[1:], copying[1:]  # the first round warms up


def in_fresh_process(arguments: argparse.Namespace, mode: str) -> dict:
    command = [sys.executable, __file__, "--model", arguments.model, "--method", arguments.method]
    command += ["--g", str(arguments.g), "--in-process", mode]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def in_process(arguments: argparse.Namespace) -> None:
    model, _ = models.create(arguments.model, "none")
    original = size(model)
    result = 0
    start = time.perf_counter()
    if arguments.in_process == "copy":
        weights = [m.weight.detach() for m in model.modules() if isinstance(m, nn.Conv2d)]
        copies = [w.repeat(arguments.g, *[1] * (w.dim() - 1)) for w in weights]
        result = sum(t.numel() * t.element_size() for t in copies)
    elif arguments.in_process == "convert":
        result = size(dyconvert.convert(model, method=arguments.method, g=arguments.g))
    else:
        # What tracing and the trial run import is not the conversion's memory.
        dyconvert.plan(model, arguments.method, arguments.g)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak": peak, "original": original, "result": result}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--method", default="dynet")
    parser.add_argument("--g", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--in-process", choices=("plan", "convert", "copy"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.in_process:
        in_process(arguments)
        return
    # First, while this process is small: a child's peak starts at what its parent has resident.
    without, with_ = in_fresh_process(arguments, "plan"), in_fresh_process(arguments, "convert")
    fresh = [
        [in_fresh_process(arguments, mode)["seconds"] for mode in ("convert", "copy")] for _ in range(arguments.repeats)
    ]
    model, _ = models.create(arguments.model, "none")
    converting, copying = times(model, arguments.method, arguments.g, arguments.repeats)
    ratios = [a / b for a, b in zip(converting, copying, strict=True)]
    print(
        f"{arguments.model}, {arguments.method}, g = {arguments.g}; "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    print(f"{platform.processor() or platform.machine()}, {arguments.repeats} rounds in turns; median (least .. most)")
    rows = {
        "convert, s": converting,
        "copy g times, s": copying,
        "ratio": ratios,
        "fresh: convert, s": [a for a, _ in fresh],
        "fresh: copy, s": [b for _, b in fresh],
        "fresh: ratio": [a / b for a, b in fresh],
    }
    for name, values in rows.items():
        print(f"  {name:18s} {statistics.median(values):6.3f} ({min(values):.3f} .. {max(values):.3f})")
    both = with_["original"] + with_["result"]
    used = with_["peak"] - without["peak"] + with_["original"]
    print(f"peak memory {used / 1e6:.0f} MB; original and result {both / 1e6:.0f} MB; ratio {used / both:.2f}")


if __name__ == "__main__":
    main()
