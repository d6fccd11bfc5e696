"""Timing that can be compared: in turns, medians, and with what disturbed it left out or named."""

import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch


class Timing(NamedTuple):
    """Seconds of one call.

    Attributes:
        median: of the runs.
        low, high: their quartiles.
        disturbed: the share of runs during which the system gave this process's core to another.
    """

    median: float
    low: float
    high: float
    disturbed: float


def in_turns(
    calls: Mapping[str, Callable[[], object]],
    repeats: int = 15,
    seconds: float = 4.0,
    cpu: bool = False,
    device: torch.device | None = None,
) -> dict[str, Timing]:
    """Time the calls in turns, so that what slows the machine down meets all of them.

    The order is shuffled every round, because each call starts with the cache that the call before it left. Runs
    that were interrupted for another process count only if there are too few others.

    Args:
        repeats: rounds of all the calls, after one that isn't timed.
        seconds: no further round starts after so long, but there are at least 3.
        cpu: count this process's CPU time, which others on the machine disturb less. With one thread it is what
            the wall clock would show on a machine of one's own; with more, it is the sum over them.
        device: where the calls compute; None is the CPU. Other devices are waited for: a call only hands them work.
    """
    wait = partial(torch.accelerator.synchronize, device) if device and device.type != "cpu" else _go_on
    for call in calls.values():
        call()
    clock = time.process_time if cpu else time.perf_counter
    runs: dict[str, list[tuple[float, bool]]] = {name: [] for name in calls}
    order = list(calls)
    shuffle = random.Random(0).shuffle  # not the global generator
    began = time.perf_counter()
    for number in range(repeats):
        if number >= 3 and time.perf_counter() - began > seconds:
            break
        last = order[-1]
        shuffle(order)
        if order[0] == last:  # nothing runs twice in a row
            order.reverse()
        for name in order:
            call = calls[name]
            wait()
            switches = _interruptions()
            start = clock()
            call()
            wait()
            took = clock() - start
            runs[name].append((took, not cpu and _interruptions() > switches))
    return {name: _summary(seconds_of_call) for name, seconds_of_call in runs.items()}


def _go_on() -> None:
    """Wait for nothing."""


def _summary(runs: list[tuple[float, bool]]) -> Timing:
    clean = [took for took, interrupted in runs if not interrupted]
    disturbed = 1 - len(clean) / len(runs)
    # The fastest third takes their place: an interruption can only make a run longer.
    quiet = clean if 3 * len(clean) >= len(runs) else sorted(took for took, _ in runs)[: max(len(runs) // 3, 1)]
    low, median, high = statistics.quantiles(quiet, n=4) if len(quiet) > 1 else (quiet[0],) * 3
    return Timing(median, low, high, disturbed)


def _interruptions() -> int:
    """How often the system gave this process's core to another; where it doesn't say, as on Windows, never."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def bandwidth(cpu: bool = False, device: torch.device | None = None) -> float:
    """Bytes a second at which memory that is in no cache is read, by all of torch's threads; arguments as above."""
    data = torch.ones(64 * 2**20, device=device)  # 256 MiB
    timing = in_turns({"sum": data.sum}, repeats=9, cpu=cpu, device=device)["sum"]
    return data.numel() * data.element_size() / timing.median


# Not getrusage, where there is another way: on Linux its peak is inherited from the process that started this one.
_PEAK = """
def peak():
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource, sys
        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return size // 1024 if sys.platform == "darwin" else size

before = peak()
run()
print(json.dumps(peak() - before))
"""


def peak_memory(code: str, threads: int) -> int:
    """Bytes by which `run()`, as `code` defines it, raises the process's peak memory.

    A process of its own measures it: its peak is no other's, and no memory lies ready from what ran before.
    """
    script = f"import json, torch\ntorch.set_num_threads({threads})\n{code}\n{_PEAK}"
    # Freed memory goes back to the system at once, so that the peak counts memory in use.
    environment = os.environ | {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1]) * 1024


def geometric_mean(values: Sequence[float]) -> float:
    """The geometric mean of ratios: the reciprocals' mean is its reciprocal."""
    return math.exp(sum(map(math.log, values)) / len(values))
