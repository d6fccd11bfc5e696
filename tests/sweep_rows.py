"""Rows of a long sweep over library models: each measured in a process of its own, and kept in a file as it comes.

A model that takes too long or too much memory is only a row that says so.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any


class Rows:
    """The rows of one sweep.

    Args:
        file: a JSON line for each row.
        row: their dataclass, with `case`, `problems` and `as_dict`.
        script: measures one case, called as `script --one CASE`: see :func:`measure_here`.
        seconds: the limit for one model.
        options: further arguments of the script.
    """

    def __init__(self, file: Path, row: type, script: str, seconds: float, options: Sequence[str] = ()) -> None:
        self.file, self.row, self.script, self.seconds, self.options = file, row, script, seconds, options

    def measured(self) -> dict[str, Any]:
        """The rows so far; the last one counts where a model was measured twice."""
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        return {row["case"]: self.row(**row) for row in map(json.loads, lines) if row}

    def measure(
        self,
        cases: Iterable[str],
        again: Sequence[str],
        said: Callable[[dict[str, Any]], Any],
        only_missing: bool = False,
    ) -> None:
        """Measure what is missing or had problems, and what begins as one of `again`; then a row each, in order.

        Rows of other cases, as of a library that isn't installed here, are kept after them. `only_missing` leaves those
        with problems as they are: a sweep that goes on after a stop has seen them.
        """
        cases = list(cases)
        done = self.measured()
        for case in cases:
            missing = case not in done or (done[case].problems and not only_missing)
            if missing or case.startswith(tuple(again) or "-"):
                row = self._measured_apart(case)
                with self.file.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(case, row["seconds"], row["problems"] or said(row), flush=True)
        done = self.measured()
        ordered = [case for case in cases if case in done]
        ordered += [case for case in done if case not in ordered]
        self.file.write_text("".join(json.dumps(done[case].as_dict()) + "\n" for case in ordered))

    def _measured_apart(self, case: str) -> dict[str, Any]:
        """The model's row, from a process that is ended when it takes too long."""
        environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        command = [sys.executable, self.script, "--one", case, *self.options]
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=self.seconds)
        except subprocess.TimeoutExpired:
            return self.row(case, problems=[f"took longer than {self.seconds} s"]).as_dict()
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"]
            return self.row(case, problems=[lines[-1][:300]]).as_dict()
        return json.loads(done.stdout.splitlines()[-1])


def measure_here(examine: Callable[[str], Any], case: str, gigabytes: int) -> None:
    """Print the row of one case, within so much memory."""
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (gigabytes << 30, gigabytes << 30))
    print(json.dumps(examine(case).as_dict()))
