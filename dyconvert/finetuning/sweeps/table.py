"""The table of a sweep: mean and standard deviation over the seeds of each run."""

import statistics
from collections.abc import Callable, Iterable
from typing import Any

_TITLES = {"original": "original", "converted": "converted", "finetuned": "fine-tuned", "ema": "EMA"}


def table_rows(rows: Iterable[dict[str, Any]], count: Callable[[float], str]) -> list[list[str]]:
    """The cells of the table, its header first.

    Each metric is "mean ± standard deviation" over the seeds. If all runs have the same original, it is
    the first row; else it is a column.
    """
    rows = list(rows)
    rows_of_run: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        rows_of_run.setdefault(row["run"], []).append(row)
    shared: dict[int, set[float]] = {}
    for row in rows:
        shared.setdefault(row["seed"], set()).add(round(row["original"], 4))
    one_original = all(len(values) == 1 for values in shared.values())
    metrics = [*([] if one_original else ["original"]), "converted", "finetuned"]
    metrics += ["ema"] if any(row["ema"] is not None for row in rows) else []
    table = [["run", *(_TITLES[metric] for metric in metrics), "seeds", "parameters", "MACs", "seconds"]]
    if rows and one_original:
        values = [value for (value,) in shared.values()]
        # The same for every seed, unless the static network was trained first.
        table.append(
            ["original", _mean_text(values if len(set(values)) > 1 else values[:1]), *[""] * (len(table[0]) - 2)]
        )
    for run, seeds in rows_of_run.items():
        cells = [_mean_text([row[metric] for row in seeds if row[metric] is not None]) for metric in metrics]
        sizes = [_counted(seeds, key, count) for key in ("parameters", "macs")]
        seconds = statistics.fmean(row["seconds"] for row in seeds)
        table.append([run, *cells, str(len(seeds)), *sizes, f"{seconds:.0f}"])
    return table


def markdown(rows: Iterable[dict[str, Any]], count: Callable[[float], str]) -> str:
    """The same table in Markdown."""
    header, *lines = table_rows(rows, count)
    ruler = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ruler, *lines)) + "\n"


def _mean_text(values: list[float]) -> str:
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def _counted(rows: list[dict[str, Any]], key: str, count: Callable[[float], str]) -> str:
    value = rows[0][key]
    return "" if value is None else count(value)
