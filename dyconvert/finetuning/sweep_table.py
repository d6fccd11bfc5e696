"""The table of a sweep: mean and spread over the seeds of each run."""

import statistics
from collections.abc import Callable, Iterable
from typing import Any

_METRICS = ("converted", "finetuned", "ema")


def table_rows(rows: Iterable[dict[str, Any]], count: Callable[[float], str]) -> list[list[str]]:
    """The cells of the table, its header first; the original stands in the first row.

    Each metric is "mean ± standard deviation" over the seeds.
    """
    rows = list(rows)
    runs: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        runs.setdefault(row["run"], []).append(row)
    ema = any(row["ema"] is not None for row in rows)
    metrics = _METRICS if ema else _METRICS[:2]
    titles = {"converted": "converted", "finetuned": "fine-tuned", "ema": "EMA"}
    table = [["run", *(titles[metric] for metric in metrics), "seeds", "parameters", "MACs", "s a run"]]
    originals = sorted({round(row["original"], 6) for row in rows if row["original"] is not None})
    if originals:
        # Several where the static network is trained first, once a seed, or runs have different models.
        shown = _spread(originals)
        table.append(["original", shown, *[""] * (len(metrics) - 1), "", "", "", ""])
    for run, each in runs.items():
        cells = [_spread([row[metric] for row in each if row[metric] is not None]) for metric in metrics]
        sizes = [_counted(each, key, count) for key in ("parameters", "macs")]
        seconds = statistics.fmean(row["seconds"] for row in each)
        table.append([run, *cells, str(len(each)), *sizes, f"{seconds:.0f}"])
    return table


def markdown(rows: Iterable[dict[str, Any]], count: Callable[[float], str]) -> str:
    """The same table in Markdown."""
    header, *lines = table_rows(rows, count)
    ruler = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ruler, *lines)) + "\n"


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def _counted(rows: list[dict[str, Any]], key: str, count: Callable[[float], str]) -> str:
    value = rows[0][key]
    return "" if value is None else count(value)
