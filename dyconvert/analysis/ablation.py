"""Reads the results of fine-tuning: a sweep's table, with mean and deviation over seeds, and the curves of one run."""

import csv
import io
import json
import math
import statistics
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from dyconvert.errors import DyconvertError
from dyconvert.limits import CSV_BYTES, FIGURE, JSON_BYTES, parse_json, read_text
from dyconvert.run_files import COSTS, METRICS, SCORES, SETTINGS, SUMMARY


class Score(BaseModel):
    """Mean, sample standard deviation (0 for a single run), extremes and number of runs."""

    mean: float
    deviation: float
    low: float
    high: float
    runs: int


class Setting(BaseModel):
    """Runs that differ only in their seed.

    Attributes:
        run: its name in the sweep.
        width, flops: the share of the channels, or of the multiply-adds, that narrowing aimed at.
        scores: top-1 in percent: of the "original", "converted", "finetuned", and of the averaged weights, "ema".
        costs: the means of "parameters", "macs" and "seconds".
    """

    run: str
    recipe: str
    method: str
    g: int | None
    width: float | None
    flops: float | None = None
    static: bool
    epochs: float | None
    scores: dict[str, Score]
    costs: dict[str, float]


class Course(BaseModel):
    """A column of a run's metrics.csv over its epochs: the last value of each epoch."""

    name: str
    epochs: list[float]
    values: list[float]


class RunCurves(BaseModel):
    """The summary of one fine-tuning run, and the courses of its metrics."""

    summary: dict[str, Any]
    courses: list[Course]


class Ablation(BaseModel):
    """All settings of a sweep, in the order of the file."""

    file: str
    settings: list[Setting]


def read_sweep(file: Path) -> Ablation:
    """Read a sweep's table, a row a run, with the columns of `SETTINGS`, `SCORES` and `COSTS`.

    Raises:
        DyconvertError: the file can't be read, lacks columns, or holds no run or words for numbers.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(file, CSV_BYTES), newline="")))
    except (OSError, ValueError, csv.Error) as error:
        raise DyconvertError(f"{file} can't be read: {error}. Give a sweep's CSV: `sweep=...`.") from error
    if not rows:
        raise DyconvertError(f"{file} holds no run. Give the CSV of a sweep that has run.")
    if missing := [name for name in ("method", "g", "width", "static", "finetuned") if name not in rows[0]]:
        raise DyconvertError(f"{file} has no column {', '.join(missing)}. A sweep's CSV has them; is it another one?")
    rows_of_setting: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        rows_of_setting.setdefault(tuple((row.get(name) or "").strip() for name in SETTINGS), []).append(row)
    settings = []
    for key, rows_of_seeds in rows_of_setting.items():
        known = dict(zip(SETTINGS, key, strict=True))
        scores = {name: _score([_number(file, row, name) for row in rows_of_seeds]) for name in SCORES}
        costs = {name: _score([_number(file, row, name) for row in rows_of_seeds]) for name in COSTS}
        g = _number(file, known, "g")
        settings.append(
            Setting(
                run=known["run"] or known["method"] or "static",
                recipe=known["recipe"],
                method=known["method"],
                g=None if g is None else int(g),
                width=_number(file, known, "width"),
                flops=_number(file, known, "flops"),
                static=known["static"].lower() in ("true", "1", "yes", "static"),
                epochs=_number(file, known, "epochs"),
                scores={name: score for name, score in scores.items() if score is not None},
                costs={name: cost.mean for name, cost in costs.items() if cost is not None},
            )
        )
    return Ablation(file=file.name, settings=settings)


def read_run(directory: Path) -> RunCurves | None:
    """Read a fine-tuning run's summary.json and metrics.csv. None if neither is there.

    Raises:
        DyconvertError: one of them can't be read.
    """
    summary, courses = {}, []
    try:
        if (directory / SUMMARY).is_file():
            # The name of the run's folder may have bytes that aren't text; they are replaced.
            written = parse_json(read_text(directory / SUMMARY, JSON_BYTES))
            written = json.loads(json.dumps(written, ensure_ascii=False).encode("utf-8", "replace"))
            summary = written if isinstance(written, dict) else {}
        if (directory / METRICS).is_file():
            courses = _courses(directory / METRICS)
    except (OSError, ValueError, csv.Error) as error:
        raise DyconvertError(f"The run in {directory} can't be read: {error}. Remove the damaged file.") from error
    return RunCurves(summary=summary, courses=courses) if summary or courses else None


def _courses(file: Path) -> list[Course]:
    # Lightning's logger writes a row for each step or epoch, with empty cells where a metric wasn't logged.
    courses: dict[str, dict[float, float]] = {}
    for row in csv.DictReader(io.StringIO(read_text(file, CSV_BYTES), newline="")):
        if not row.get("epoch"):
            continue
        epoch = _plain(float(row["epoch"]))
        for name, text in row.items():
            if name in ("epoch", "step") or not isinstance(name, str) or not isinstance(text, str) or not text.strip():
                continue
            value = float(text)
            if math.isfinite(value) and epoch is not None:
                courses.setdefault(name, {})[epoch] = _plain(value)
    return [
        Course(name=name, epochs=sorted(values), values=[values[epoch] for epoch in sorted(values)])
        for name, values in courses.items()
    ]


def _plain(value: float) -> float:
    """The value, if it can be drawn: its sums and squares must be finite.

    Raises:
        ValueError: it can't be drawn.
    """
    if not math.isfinite(value) or abs(value) > FIGURE:
        raise ValueError(f"{value:g} is beyond what can be drawn")
    return value


def _number(file: Path, row: dict[str, str], name: str) -> float | None:
    text = (row.get(name) or "").strip()
    if text.lower() in ("", "none", "null", "nan"):
        return None
    try:
        return _plain(float(text))
    except ValueError:
        raise DyconvertError(f"{file} has {text!r} for {name}, which is no number to show. Correct it.") from None


def _score(values: list[float | None]) -> Score | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    deviation = statistics.stdev(known) if len(known) > 1 else 0.0
    return Score(mean=statistics.fmean(known), deviation=deviation, low=min(known), high=max(known), runs=len(known))
