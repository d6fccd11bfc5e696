"""Write docs/narrowing-coverage.md: narrowing to half the width, for the smallest model of every family.

    python tests/make_narrowing.py                 # measure what is missing or had problems, write the table
    python tests/make_narrowing.py --again timm:   # and these: names, or how they begin
    python tests/make_narrowing.py --table         # only write the table from what was measured

Each model is measured in a process of its own, so that one that takes too long or too much memory is only a row that
says so. Rows are kept in docs/narrowing-coverage.jsonl as they come.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from narrowing_covering import FRESH, IMAGES, TOO_LARGE, Row, cases

DOCS = Path(__file__).parents[1] / "docs"
ROWS = DOCS / "narrowing-coverage.jsonl"
TABLE = DOCS / "narrowing-coverage.md"

# Seconds and gigabytes for one model.
TIME = 900
MEMORY = 12


def measured() -> dict[str, Row]:
    """The rows so far; the last one counts where a model was measured twice."""
    lines = ROWS.read_text().splitlines() if ROWS.exists() else []
    return {row["case"]: Row(**row) for row in map(json.loads, lines) if row}


def measure(case: str) -> dict[str, Any]:
    """The model's row, from a process that is ended when it takes too long."""
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    command = [sys.executable, __file__, "--one", case]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIME)
    except subprocess.TimeoutExpired:
        return Row(case, problems=[f"took longer than {TIME} s"]).as_dict()
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"])[-1]
        return Row(case, problems=[said[:300]]).as_dict()
    return json.loads(done.stdout.splitlines()[-1])


def one(case: str) -> None:
    import resource

    from narrowing_covering import examine

    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY << 30, MEMORY << 30))
    print(json.dumps(examine(case).as_dict()))


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
    wanted, found = cases(), measured()
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
    options = parser.parse_args()
    if options.one:
        one(options.one)
        return
    if not options.table:
        done = measured()
        for case in cases():
            if case not in done or done[case].problems or case.startswith(tuple(options.again) or "-"):
                row = measure(case)
                with ROWS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(
                    case, row["seconds"], row["problems"] or row["refused"] or (row["error"], row["merged"]), flush=True
                )
        done = measured()
        ROWS.write_text("".join(json.dumps(done[case].as_dict()) + "\n" for case in cases() if case in done))
    write_table()


if __name__ == "__main__":
    main()
