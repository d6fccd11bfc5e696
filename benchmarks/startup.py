"""How long the commands take that do no work, and `import dyconvert`, beside `python -c pass` and `import torch`.

    python benchmarks/startup.py

Each is run in a fresh process, all of them in turns; the table has the median seconds, how many more that is than the
base's, and the bar. Exit code 1 if a bar is missed.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

PASS = "python -c pass"
TORCH = "import torch"
CODE = {
    PASS: "pass",
    TORCH: TORCH,
    "import dyconvert": "import torch, dyconvert",
    "dyconvert.convert": "import torch, dyconvert; dyconvert.convert, dyconvert.DynamicConv2d",
}
COMMANDS = [
    "--help",
    "--version",
    "convert --help",
    "bench layers --help",
    "inspekt DIR",
    "resnet5o",
    "convert resnet18 --gg 6",
    "recipes ls",
    "recipes show quickstart",
    "recipes cp quickstart {}",
    "recipes validate quickstart",
    "recipes schema",
    "methods",
    "ls",
]
# Seconds more than the base.
BARS = {**dict.fromkeys(COMMANDS, 0.4), "ls": 0.6, "import dyconvert": 0.15}


def seconds(arguments: list[str]) -> float:
    """The time of one process."""
    started = time.perf_counter()
    subprocess.run(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    taken: dict[str, list[float]] = {name: [] for name in (*CODE, *COMMANDS)}
    for number in range(rounds + 1):
        for name in taken:
            if name in CODE:
                arguments = [sys.executable, "-c", CODE[name]]
            else:
                file = os.devnull + ".yaml"  # refused, as the folder is none to write to; all else is as with a copy
                arguments = [sys.executable, "-m", "dyconvert", *name.format(file).split()]
            found = seconds(arguments)
            if number:  # the first round fills the disk's cache
                taken[name].append(found)
    median = {name: statistics.median(each) for name, each in taken.items()}
    missed = []
    print(f"{'':30} {'seconds':>8} {'more':>8} {'bar':>6}")
    for name, found in median.items():
        base = median[TORCH] if name in CODE and name not in (PASS, TORCH) else median[PASS]
        bar = BARS.get(name)
        if bar is not None and found - base > bar:
            missed.append(name)
        more = f"{found - base:8.3f}" if name != PASS else " " * 8
        print(f"{name:30} {found:8.3f} {more} {bar or '':>6}")
    if missed:
        sys.exit(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
