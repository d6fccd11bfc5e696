"""The numbers of an analysis as tables, to be written as CSV."""

import csv
import io
from collections.abc import Iterable
from typing import Any

from dyconvert.analysis.coefficients import BINS as COEFFICIENT_BINS
from dyconvert.analysis.correlation import BINS as CORRELATION_BINS
from dyconvert.analysis.study import Analysis

Rows = list[dict[str, Any]]


def tables(analysis: Analysis) -> dict[str, str]:
    """The tables as CSV, by file name. Figures that the analysis left out have no file."""
    tables_by_name = {
        "plan": [conv.model_dump(exclude={"note"}) | {"note": conv.note} for conv in analysis.plan.convs],
        "accuracy": list(_accuracy(analysis)),
        "confusions": list(_confusions(analysis)),
        "correlation": list(_correlation(analysis)),
        "coefficients": list(_coefficients(analysis)),
        "factors": list(_factors(analysis)),
        "coefficient_histograms": list(_histograms(analysis)),
        "classes": list(_classes(analysis)),
        "resolution": list(_resolution(analysis)),
        "cost": list(_cost(analysis)),
        "ablation": list(_ablation(analysis)),
    }
    return {f"{name}.csv": _csv(rows) for name, rows in tables_by_name.items() if rows}


def _csv(rows: Rows) -> str:
    out = io.StringIO()
    columns = dict.fromkeys(key for row in rows for key in row)
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _safe(value) for key, value in row.items()} for row in rows)
    return out.getvalue()


def _safe(value: Any) -> Any:
    """Puts an apostrophe before text that a spreadsheet would run as a formula: class names come from folders."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def _accuracy(analysis: Analysis) -> Iterable[dict[str, Any]]:
    accuracy = analysis.accuracy
    if accuracy is None:
        return
    mine = "dynamic" if analysis.dynamic else "static"
    shares = [
        ("all classes", accuracy.model, accuracy.original),
        *((c.name, c.model, c.original) for c in accuracy.classes),
    ]
    for name, ours, theirs in shares:
        row: dict[str, Any] = {"class": name, "images": ours.images}
        for called, share in (("original", theirs), (mine, ours)):
            if share is not None:
                row |= {f"{field}_{called}": getattr(share, field) for field in ("right", "percent", "low", "high")}
        yield row


def _confusions(analysis: Analysis) -> Iterable[dict[str, Any]]:
    mine = "dynamic" if analysis.dynamic else "static"
    for pair in analysis.accuracy.confusions if analysis.accuracy else ():
        yield {"class": pair.label, "taken for": pair.taken_for, "original": pair.original, mine: pair.model}


def _correlation(analysis: Analysis) -> Iterable[dict[str, Any]]:
    mine = "dynamic" if analysis.dynamic else "static"
    rows = [(f"maps of {c.layer}", mine, c.model) for c in analysis.correlations]
    rows += [(f"maps of {c.layer}", "original", c.original) for c in analysis.correlations if c.original is not None]
    rows += [(f"experts of {c.conv}", mine, c.between) for c in analysis.experts]
    for what, of, correlation in rows:
        row = {"what": what, "of": of, "pairs": correlation.pairs, "mean_absolute": correlation.mean_absolute}
        row |= correlation.bands
        low = [round(-1 + 2 * i / CORRELATION_BINS, 4) for i in range(CORRELATION_BINS)]
        yield row | {f"from {edge}": count for edge, count in zip(low, correlation.histogram, strict=True)}


def _coefficients(analysis: Analysis) -> Iterable[dict[str, Any]]:
    for conv in analysis.coefficients.convs if analysis.coefficients else ():
        whole = conv.model_dump(exclude={"experts", "signature", "axes"})
        for number, expert in enumerate(conv.experts, 1):
            of_expert = {
                "mean": expert.mean,
                "smallest": expert.smallest,
                "largest": expert.largest,
                "used": expert.used,
            }
            yield {"name": conv.name, "expert": number, **of_expert, **whole}


def _factors(analysis: Analysis) -> Iterable[dict[str, Any]]:
    for conv in analysis.coefficients.convs if analysis.coefficients else ():
        for axis, use in conv.axes.items():
            means = {f"mean {number + 1}": round(mean, 6) for number, mean in enumerate(use.means)}
            yield {"name": conv.name, "axis": axis, **use.model_dump(exclude={"means"}), **means}


def _histograms(analysis: Analysis) -> Iterable[dict[str, Any]]:
    low = [round(i / COEFFICIENT_BINS, 4) for i in range(COEFFICIENT_BINS)]
    for conv in analysis.coefficients.convs if analysis.coefficients else ():
        for number, expert in enumerate(conv.experts, 1):
            bins = {f"from {edge}": count for edge, count in zip(low, expert.histogram, strict=True)}
            yield {"name": conv.name, "expert": number} | bins


def _classes(analysis: Analysis) -> Iterable[dict[str, Any]]:
    for conv in analysis.coefficients.convs if analysis.coefficients else ():
        for number, expert in enumerate(conv.experts, 1):
            if any(mean is not None for mean in expert.class_means):
                means = dict(zip(analysis.classes, expert.class_means, strict=True))
                yield {"name": conv.name, "expert": number} | means


def _resolution(analysis: Analysis) -> Iterable[dict[str, Any]]:
    for at_size in analysis.resolution.sizes if analysis.resolution else ():
        for name, timing in at_size.seconds.items():
            row = {"size": at_size.size, "what": name, "seconds": timing.median, "low": timing.low, "high": timing.high}
            yield row | {"macs": at_size.macs.get(name), "latency_reduced": at_size.latency_reduced(name)}


def _cost(analysis: Analysis) -> Iterable[dict[str, Any]]:
    for block in analysis.cost.blocks if analysis.cost else ():
        row = {"block": block.name, "convs": block.convs, "dynamic": block.dynamic}
        mine = "dynamic" if analysis.dynamic else "static"
        for key, called in (("before", "original"), ("after", mine)):
            cost = getattr(block, key)
            row |= {f"{field}_{called}": value for field, value in (cost.model_dump() if cost else {}).items()}
        yield row


def _ablation(analysis: Analysis) -> Iterable[dict[str, Any]]:
    for setting in analysis.ablation.settings if analysis.ablation else ():
        row = setting.model_dump(exclude={"scores", "costs"})
        for name, score in setting.scores.items():
            row |= {f"{name}_{field}": value for field, value in score.model_dump().items()}
        yield row | setting.costs
