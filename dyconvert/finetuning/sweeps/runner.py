"""Runs a sweep's jobs, one after the other or several at a time, and keeps their rows in sweep.csv."""

import csv
import hashlib
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
from dyconvert.finetuning import finetune
from dyconvert.finetuning.recipes.recipe import Recipe
from dyconvert.finetuning.sweeps.schema import Job, Sweep, jobs_of

COLUMNS = (
    "run", "seed", "recipe", "method", "g", "width", "static", "epochs",
    "original", "converted", "finetuned", "ema", "parameters", "macs", "seconds", "fingerprint",
)  # fmt: skip


class Runner:
    """The jobs of a sweep and what has become of them, in a directory.

    Attributes:
        jobs: every run with every seed.
        csv: the file of the rows, one a finished job.
        markdown: the file of the table.
    """

    def __init__(
        self, sweep: Sweep, directory: Path, only: Sequence[str] = (), seeds: Sequence[int] | None = None
    ) -> None:
        self.directory = Path(os.path.abspath(directory))
        self.csv = self.directory / "sweep.csv"
        self.markdown = self.directory / "sweep.md"
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
        """The rows of the jobs that are done, in their order by run."""
        order = {run: index for index, run in enumerate(dict.fromkeys(job.run for job in self.jobs))}
        done = [job for job in self.jobs if self.is_done(job)]
        return [self._saved[job.run, job.seed] for job in sorted(done, key=lambda job: (order[job.run], job.seed))]

    def run(self, workers: int = 1, report: Callable[[str], None] = lambda line: None) -> list[str]:
        """Run what isn't done; each row is saved as its job ends.

        Args:
            workers: processes at a time. With one, the jobs run in this process, and show their progress.
            report: gets a line as a job starts, ends or fails.

        Returns:
            Of each job that failed, which and why; the others have run all the same.
        """
        waiting = [job for job in self.jobs if not self.is_done(job)]
        report(f"{len(self.jobs)} runs, {len(self.jobs) - len(waiting)} of them done; rows go to {self.csv}")
        self.directory.mkdir(parents=True, exist_ok=True)
        if workers == 1:
            return self._run_here(waiting, report)
        return self._run_in_processes(waiting, workers, report)

    def _run_here(self, waiting: list[Job], report: Callable[[str], None]) -> list[str]:
        failed = []
        for job in waiting:
            report(f"\n{job}")
            try:
                self._keep(job, run_job(job.recipe, progress=True), report)
            except DyconvertError as error:
                failed.append(f"{job}: {error}")
                report(f"{job} failed: {error}")
        return failed

    def _run_in_processes(self, waiting: list[Job], workers: int, report: Callable[[str], None]) -> list[str]:
        failed = []
        # Read by the children's OpenMP as they start; more threads than cores slow each other down.
        os.environ["OMP_NUM_THREADS"] = "1"
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
            running = {pool.submit(run_job, job.recipe): job for job in waiting}
            try:
                while running:
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        job = running.pop(future)
                        try:
                            self._keep(job, future.result(), report)
                        except (DyconvertError, BrokenProcessPool) as error:
                            failed.append(f"{job}: {error}")
                            report(f"{job} failed: {error}")
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return failed

    def _keep(self, job: Job, result: dict[str, Any], report: Callable[[str], None]) -> None:
        recipe = job.recipe
        method = recipe.convert and recipe.convert.resolved()
        self._saved[job.run, job.seed] = {
            "run": job.run,
            "seed": job.seed,
            "recipe": self._recipe,
            "method": method.name if method else None,
            "g": method.g if method else None,
            "width": recipe.narrow and (recipe.narrow.width or recipe.narrow.flops),
            "static": method is None,
            "epochs": recipe.train.epochs,
            **result,
            "fingerprint": fingerprint(recipe),
        }
        write_rows(self.csv, self._saved.values())
        report(f"{job}: {result['finetuned']:.2f} in {result['seconds']:.0f} s")


def run_job(recipe: Recipe, progress: bool = False) -> dict[str, Any]:
    """Run one recipe, from where an earlier try was stopped if there was one, and return its figures."""
    from dyconvert.finetuning.directory import RECIPE

    done = finetune(recipe, resume=(recipe.directory / RECIPE).is_file(), progress=progress)
    return {
        "original": done.original,
        "converted": done.converted,
        "finetuned": done.finetuned,
        "ema": done.ema,
        "parameters": done.parameters[1],
        "macs": done.macs[1] if done.macs else None,
        "seconds": round(done.seconds, 1),
    }


def fingerprint(recipe: Recipe) -> str:
    """Of everything that the result depends on; not of where it is written."""
    text = recipe.model_dump_json(exclude={"output": True, "name": True, "description": True})
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def read_rows(file: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The rows of a sweep.csv, by run and seed; none if the file isn't there."""
    if not file.is_file():
        return {}
    with file.open(newline="", encoding="utf-8") as stream:
        rows = [{key: _value(key, text) for key, text in row.items()} for row in csv.DictReader(stream)]
    try:
        return {(row["run"], row["seed"]): row for row in rows if row["fingerprint"]}
    except KeyError as error:
        raise RecipeError(f"{file} has no column {error}; it isn't a sweep's. Use another directory.") from None


def write_rows(file: Path, rows: Any) -> None:
    """Replace sweep.csv, in one step."""
    part = file.with_suffix(".csv.part")
    with part.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(part, file)


def _value(key: str, text: str | None) -> Any:
    if not text:
        return None
    if key in ("run", "recipe", "method", "fingerprint"):
        return text
    if key == "static":
        return text == "True"
    return int(text) if key in ("seed", "g", "epochs") else float(text)


def _end_with_parent() -> None:
    """Keep this process from training on, beside its own successor, where the parent was killed."""
    import torch

    torch.set_num_threads(1)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
