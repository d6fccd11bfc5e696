"""How many files one reads to follow a command: every function once, in the order of its first call.

    python benchmarks/walks.py resnet50 --g 6 --weights none --dry-run
    python benchmarks/walks.py finetune quickstart --dry-run

Prints the files of dyconvert that run, how often one goes on to a file not read before, and how often one comes back to
one that was. Functions that run while a module is imported don't count.
"""

import sys
import threading
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import dyconvert
from dyconvert.cli import main

PACKAGE = str(Path(dyconvert.__file__).parent)


def walk(arguments: list[str]) -> list[str]:
    """The files of the functions that a command calls, in the order of their first calls."""
    visits: list[str] = []
    read: set[CodeType] = set()

    def see(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event != "call" or code in read or not code.co_filename.startswith(PACKAGE) or code.co_name == "<module>":
            return
        read.add(code)
        if not visits or visits[-1] != code.co_filename:
            visits.append(code.co_filename)

    sys.argv = ["dyconvert", *arguments]
    threading.setprofile(see)
    sys.setprofile(see)
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return [str(Path(visit).relative_to(PACKAGE)) for visit in visits]


if __name__ == "__main__":
    steps = walk(sys.argv[1:])
    files = list(dict.fromkeys(steps))
    for file in files:
        print(f"{steps.count(file):4}  {file}")
    rooms = [step.split("/")[0] for step in steps]
    rooms = [room for room, before in zip(rooms, ["", *rooms], strict=False) if room != before]
    print(f"{len(files)} files, {len(steps) - len(files)} returns to one of them")
    print(f"{len(set(rooms))} rooms (docs/layout.md), {len(rooms) - len(set(rooms))} returns to one of them")
