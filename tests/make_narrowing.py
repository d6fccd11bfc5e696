"""Write docs/narrowing-coverage.md: narrowing to half the width, for the smallest model of every family.

    python tests/make_narrowing.py                 # measure what is missing or had problems, write the table
    python tests/make_narrowing.py --again timm:   # and these: names, or how they begin
    python tests/make_narrowing.py --table         # only write the table from what was measured

Each model is measured in a process of its own, so that one that takes too long or too much memory is only a row that
says so. Rows are kept in docs/narrowing-coverage.jsonl as they come.
"""

import argparse
import re
from collections import Counter
from pathlib import Path

from narrowing_covering import FRESH, IMAGES, TOO_LARGE, Row, cases
from sweep_rows import Rows, measure_here

DOCS = Path(__file__).parents[1] / "docs"
ROWS = DOCS / "narrowing-coverage.jsonl"
TABLE = DOCS / "narrowing-coverage.md"

# Seconds and gigabytes for one model.
TIME = 900
MEMORY = 12


SWEEP = Rows(ROWS, Row, __file__, TIME)


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def in_general(why: str) -> str:
    """Without the names of modules and operators."""
    why = re.sub(r"^[\w.]+: ", "", why)
    return re.sub(r"coupled in several ways at .*", "coupled in several ways", why)


def line(row: Row) -> str:
    kept = "; ".join(f"{count} {why}" for why, count in Counter(row.kept).most_common(3))
    said = "; ".join([*row.problems, row.refused] if row.refused else row.problems) or kept
    errors = number(row.error) + (" (merged)" if row.init == "merge" and row.error is not None else "")
    target = "–" if row.asked is None else f"{row.asked:.0%}: {percent(row.met)}"
    cells = (
        row.case,
        f"{row.narrowed} of {row.groups}",
        percent(row.macs),
        target,
        f"{row.solved} of {row.layers}" if row.layers else "–",
        errors,
        number(row.merged),
        said.replace("|", "/"),
    )
    return f"| {' | '.join(cells)} |"


def write_table() -> None:
    wanted, found = cases(), SWEEP.measured()
    rows = [found[case] for case in wanted if case in found]
    narrowed = [row for row in rows if not row.refused and not row.problems]
    better = [row for row in narrowed if row.init == "least-squares"]
    kept = Counter()
    for row in rows:
        for why, count in row.kept.items():
            kept[in_general(why)] += count
    lines = [
        "# Narrowing library models",
        "",
        "What `dyconvert.narrow(model, width=0.5, data=images)` does with the smallest model of each of timm's modules",
        f"and of torchvision's families, up to {TOO_LARGE / 1e6:.0f} million parameters, made by",
        "`python tests/make_narrowing.py`.",
        "",
        f"- Random weights, batch norms' statistics from the images, {IMAGES} images; errors are those of the outputs",
        f"  on {FRESH} fresh ones: mean square of the difference over the variance from image to image. Random weights",
        "  are the hardest case: no channel says what another one does.",
        "- **groups**: coupled groups of channels that became narrower. **MACs**: what is left of the multiply-adds at",
        "  half the width. **asked**: a share of them that was asked for as `flops=`, and what is left then.",
        "- **solved**: layers whose weights least squares found; the others' are merged, where that is better or they",
        "  can't be solved for. **error**, **by merging**: of the outputs. *(merged)*: least squares was worse on",
        "  held-out images, so that merging was taken.",
        "- Each narrowed model was saved, loaded and compared, bit by bit.",
        "",
        f"{len(rows)} models: {len(narrowed)} are narrowed, {sum(bool(row.refused) for row in rows)} refused by name, "
        f"{sum(bool(row.problems) for row in rows)} have problems. Least squares was taken for {len(better)} of them.",
        "",
        "| channels kept, why | groups |",
        "|---|---:|",
        *(f"| {why} | {count} |" for why, count in kept.most_common()),
        "",
        "| model | groups | MACs | asked | solved | error | by merging | kept or refused, why |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
        *(line(row) for row in rows),
    ]
    if missing := [case for case in wanted if case not in found]:
        lines += ["", f"Not measured yet: {', '.join(missing)}."]
    TABLE.write_text("\n".join(lines) + "\n")
    print(f"{TABLE}: {len(rows)} of {len(wanted)} models")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", metavar="CASE", help=argparse.SUPPRESS)
    parser.add_argument("--again", nargs="+", default=[], metavar="CASE", help="measure these afresh")
    parser.add_argument("--table", action="store_true", help="only write the table")
    parser.add_argument("--missing", action="store_true", help="measure no model twice, not even one with problems")
    options = parser.parse_args()
    if options.one:
        from narrowing_covering import examine

        measure_here(examine, options.one, MEMORY)
        return
    if not options.table:
        SWEEP.measure(
            cases(), options.again, lambda row: row["refused"] or (row["error"], row["merged"]), options.missing
        )
    write_table()


if __name__ == "__main__":
    main()
