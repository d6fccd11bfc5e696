"""Runs a sweep's jobs, one after the other or several at a time, and keeps their rows in sweep.csv."""

import csv
import io
import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from dyconvert.errors import DyconvertError, RecipeError
from dyconvert.files import remove_leftovers, write_errors_as, write_file
from dyconvert.finetuning import finetune
from dyconvert.finetuning.directory import fingerprint
from dyconvert.finetuning.recipes.recipe import Recipe
from dyconvert.finetuning.recipes.trust import check_trusted
from dyconvert.finetuning.sweeps.schema import Job, Sweep, jobs_of
from dyconvert.limits import CSV_BYTES, FIGURE, read_text
from dyconvert.locks import locked
from dyconvert.paths import current_folder
from dyconvert.run_files import COLUMNS, RECIPE, SWEEP, TABLE, TEXTS, WHOLE_NUMBERS


class Runner:
    """Runs a sweep's jobs, and knows from its directory which are done.

    Attributes:
        jobs: every run with every seed.
        csv: the file with one row for each finished job.
        markdown: the file of the table.
    """

    def __init__(
        self, sweep: Sweep, directory: Path, only: Sequence[str] = (), seeds: Sequence[int] | None = None
    ) -> None:
        self.directory = Path(os.path.normpath(current_folder(RecipeError) / directory))
        self.csv = self.directory / SWEEP
        self.markdown = self.directory / TABLE
        self._order = [run.name for run in sweep.runs]
        self.jobs = jobs_of(sweep, self.directory, only, seeds)
        self._recipe = Path(sweep.recipe).stem
        self._saved = read_rows(self.csv)
        for job in self.jobs:
            row = self._saved.get((job.run, job.seed))
            if row is not None and row["fingerprint"] != fingerprint(job.recipe):
                raise RecipeError(
                    f"{self.csv} has a row of {job} that another recipe made. Use another directory, or remove that "
                    f"row and {job.recipe.directory} to run it anew."
                )

    def is_done(self, job: Job) -> bool:
        """Whether the job's row is saved."""
        return (job.run, job.seed) in self._saved

    def rows(self) -> list[dict[str, Any]]:
        """All saved rows in the sweep's order, also those of runs that `only` leaves out."""
        order = {run: index for index, run in enumerate(self._order)}
        return sorted(
            self._saved.values(), key=lambda row: (order.get(row["run"], len(order)), row["run"], row["seed"])
        )

    def run(
        self,
        workers: int = 1,
        report: Callable[[str], None] = lambda line: None,
        trust_code: bool = False,
    ) -> list[str]:
        """Run the jobs that aren't done; each row is saved as its job ends.

        Args:
            workers: processes at a time. With one, the jobs run in this process, and show their progress.
            report: gets a line as a job starts, ends or fails.
            trust_code: run code of the recipes' own.

        Returns:
            A line for each failed job, with the reason; all other jobs have run.

        Raises:
            RecipeError: a recipe names code that isn't trusted; nothing has run.
        """
        for job in self.jobs:
            check_trusted(job.recipe, trust_code)
        waiting = [job for job in self.jobs if not self.is_done(job)]
        report(f"{len(self.jobs)} runs, {len(self.jobs) - len(waiting)} of them done; rows go to {self.csv}")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecipeError(
                f"{self.directory} can't be made: {error.strerror}. Choose another: `directory=...`."
            ) from error
        remove_leftovers(self.directory)
        if workers == 1:
            return self._run_here(waiting, report)
        return self._run_in_processes(waiting, workers, report)

    def _run_here(self, waiting: list[Job], report: Callable[[str], None]) -> list[str]:
        failed = []
        for job in waiting:
            report(f"\n{job}")
            try:
                self._save_row(job, run_job(job.recipe, progress=True), report)
            except DyconvertError as error:
                failed.append(f"{job}: {error}")
                report(f"{job} failed: {error}")
        return failed

    def _run_in_processes(self, waiting: list[Job], workers: int, report: Callable[[str], None]) -> list[str]:
        failed = []
        # OpenMP in the child processes reads this as they start: more threads than cores would slow each other down.
        os.environ["OMP_NUM_THREADS"] = "1"
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(
            max(min(workers, len(waiting)), 1), mp_context=context, initializer=_end_with_parent
        ) as pool:
            running = {pool.submit(run_job, job.recipe): job for job in waiting}
            try:
                while running:
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        job = running.pop(future)
                        try:
                            self._save_row(job, future.result(), report)
                        except (DyconvertError, BrokenProcessPool) as error:
                            failed.append(f"{job}: {error}")
                            report(f"{job} failed: {error}")
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return failed

    def _save_row(self, job: Job, result: dict[str, Any], report: Callable[[str], None]) -> None:
        recipe = job.recipe
        method = recipe.convert and recipe.convert.resolved()
        row = {
            "run": job.run,
            "seed": job.seed,
            "recipe": self._recipe,
            "method": method.name if method else None,
            "g": method.g if method else None,
            "width": recipe.narrow and recipe.narrow.width,
            "flops": recipe.narrow and recipe.narrow.flops,
            "static": method is None,
            "epochs": recipe.train.epochs,
            **result,
            "fingerprint": fingerprint(recipe),
        }
        with write_errors_as(self.csv, RecipeError), locked(self.directory):
            # Another process may run other jobs of the sweep.
            self._saved |= read_rows(self.csv) | {(job.run, job.seed): row}
            write_rows(self.csv, self._saved.values())
        report(f"{job}: {result['finetuned']:.2f} in {result['seconds']:.0f} s")


def run_job(recipe: Recipe, progress: bool = False) -> dict[str, Any]:
    """Run one recipe, or continue it if it was interrupted, and return its figures."""
    # The runner has checked already whether the recipe's code is trusted.
    done = finetune(recipe, resume=(recipe.directory / RECIPE).is_file(), progress=progress, trust_code=True)
    return {
        "original": done.original,
        "converted": done.converted,
        "finetuned": done.finetuned,
        "ema": done.ema,
        "parameters": done.parameters[1],
        "macs": done.macs[1] if done.macs else None,
        "seconds": round(done.seconds, 1),
    }


def read_rows(file: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The rows of a sweep.csv, by run and seed; none if the file isn't there.

    Raises:
        RecipeError: it isn't a sweep's table, or was changed.
    """
    try:
        if not os.path.lexists(file):
            return {}
        # A spreadsheet writes a mark of the byte order, and semicolons in some countries.
        reader = csv.DictReader(io.StringIO(read_text(file, CSV_BYTES), newline=""))
        if missing := [
            name for name in ("run", "seed", "finetuned", "fingerprint") if name not in (reader.fieldnames or ())
        ]:
            raise ValueError(f"it has no column {missing[0]!r}")
        rows = [{name: _value(name, row.get(name)) for name in COLUMNS} for row in reader]
    except (OSError, ValueError, csv.Error) as error:
        raise RecipeError(
            f"{file} can't be read as a sweep's table: {error}. Was it saved by a spreadsheet? Restore it, or use "
            "another directory."
        ) from None
    whole = [row for row in rows if row["fingerprint"] and row["run"] and row["seed"] is not None]
    for row in whole:
        if missing := [name for name in ("original", "finetuned", "seconds") if row[name] is None]:
            raise RecipeError(f"{file} has no {missing[0]} for {row['run']}, seed {row['seed']}. Remove that row.")
    return {(row["run"], row["seed"]): row for row in whole}


def write_rows(file: Path, rows: Any) -> None:
    """Replace sweep.csv, in one step.

    Raises:
        RecipeError: it can't be written.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    write_file(file, text.getvalue(), RecipeError)


def _value(key: str, text: str | None) -> Any:
    if not text:
        return None
    if key in TEXTS:
        return text
    if key == "static":
        return text.lower() == "true"
    value = float(text)
    if not math.isfinite(value) or abs(value) > FIGURE:
        raise ValueError(f"{key} is {text}")
    if key in WHOLE_NUMBERS and value != int(value):
        raise ValueError(f"{key} is {text}, which is no whole number")
    return int(value) if key in WHOLE_NUMBERS else value


def _end_with_parent() -> None:
    """End this process when its parent is killed: else it would train on beside its own successor."""
    import torch

    torch.set_num_threads(1)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
