"""Write docs/coverage.md: what a conversion does with every model of four libraries.

    python tests/make_coverage.py                           # measure what is missing or had problems, write the table
    python tests/make_coverage.py --again timm:resnet smp:  # and these: names, or how they begin
    python tests/make_coverage.py --table                   # only write the table from what was measured
    python tests/make_coverage.py --families                # choose timm's models afresh, from its registry
    python tests/make_coverage.py --method odconv           # another method, on the models that take seconds

Each model is measured in a process of its own, so that one that takes too long or too much memory is only a row
that says so. Rows are kept in docs/coverage.jsonl as they come; those of another method in docs/coverage-METHOD.jsonl.
"""

import argparse
import json
import re
from collections import Counter
from functools import partial
from pathlib import Path

import coverage_zoo
from covering import FLOAT32, FLOAT64, TRAINING, Row, share
from sweep_rows import Rows, measure_here

from dyconvert import METHODS

DOCS = Path(__file__).parents[1] / "docs"
ROWS = DOCS / "coverage.jsonl"
PACKAGES = DOCS / "coverage-packages.jsonl"  # of tests/make_packages.py
TABLE = DOCS / "coverage.md"
TITLES = {"torchvision": "torchvision", "timm": "timm", "smp": "segmentation-models-pytorch", "hf": "HF transformers"}

# Seconds and gigabytes for one model.
TIME = 400
MEMORY = 9


# Other methods are measured on the models that took at most this many seconds with dynet: the kinds of blocks and convs
# are the same, and the whole sweep takes half an hour of a processor.
QUICK = 6


def sweep_of(method: str) -> Rows:
    file = ROWS if method == "dynet" else DOCS / f"coverage-{method}.jsonl"
    return Rows(file, Row, __file__, TIME, () if method == "dynet" else ("--method", method))


SWEEP = sweep_of("dynet")


def quick_cases() -> list[str]:
    """The models that are measured with other methods, the quickest first."""
    rows = SWEEP.measured()
    cases = [case for case in all_cases() if case in rows and rows[case].seconds <= QUICK]
    return sorted(cases, key=lambda case: rows[case].seconds)


def all_cases() -> list[str]:
    """Every model of the libraries that are installed, small libraries first."""
    libraries = ("hf", "smp", "timm", "torchvision")
    return [case for name in libraries if coverage_zoo.is_installed(name) for case in coverage_zoo.names(name)]


def counts(found: dict[str, int]) -> str:
    return "; ".join(f"{count} {why}" for why, count in found.items())


def exponent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0e}"


def line(row: Row) -> str:
    static = counts(row.skipped)
    if row.problems:
        static = "; ".join([*row.problems, static] if static else row.problems)
    difference = row.precision if row.difference is None else exponent(row.difference)
    if row.precision == "float32":
        difference += " (float32)"
    if row.compared != "outputs":
        difference += f" ({row.compared})"
    cells = (
        row.case.partition(":")[2],
        row.convs,
        row.converted,
        static.replace("|", "/"),
        row.blocks,
        row.own,
        difference,
        exponent(row.training),
    )
    return f"| {' | '.join(map(str, cells))} |"


def total(rows: list[Row], field: str) -> int:
    return sum(getattr(row, field) for row in rows)


def in_general(why: str) -> str:
    """Without the names of classes and modules, and what tracing said."""
    why = why.partition(": ")[2].partition(" (")[0] or why
    why = re.sub(r"^in no block but \S+, which", "in no block but one that", why)
    return re.sub(r"^\S+ (is called|has several|are called)", r"a conv \1", why)


def summary(rows: list[Row]) -> list[str]:
    static = Counter()
    own = Counter()
    for row in rows:
        static.update(row.skipped)
        for why, count in row.why_own.items():
            own[in_general(why)] += count
    compared = [row for row in rows if row.difference is not None]
    largest = {
        precision: exponent(max((row.difference for row in compared if row.precision == precision), default=None))
        for precision in ("float64", "float32")
    }
    lines = [
        f"{len(rows)} models with {total(rows, 'convs')} convs. Of the {total(rows, 'counted')} that read maps larger "
        f"than 1x1 and are no stem, {total(rows, 'converted')} become dynamic: **{share(rows):.1%}**. "
        f"{len(compared)} models were run before and after: the largest difference is {largest['float64']} in float64, "
        f"and {largest['float32']} in float32.",
        "",
        "| left static, why | convs |",
        "|---|---:|",
        *(f"| {why} | {count} |" for why, count in static.most_common()),
        "",
        f"{total(rows, 'converted') - total(rows, 'own')} convs share the predictors of {total(rows, 'blocks')} "
        f"blocks; {total(rows, 'own')} have their own: because they stand in no block with another conv, or because:",
        "",
        "| a predictor of its own, why | convs |",
        "|---|---:|",
        *(f"| {why} | {count} |" for why, count in own.most_common()),
    ]
    if wrong := [row.case for row in rows if row.problems]:
        lines += ["", f"Problems: {', '.join(wrong)}."]
    return lines


def write_table() -> None:
    rows = SWEEP.measured()
    cases = all_cases()
    cases += [case for case in rows if case not in cases]  # of libraries that aren't installed here
    lines = [
        "# Coverage",
        "",
        'What `dyconvert.convert(model, method="dynet")` does with the models of four libraries, made by',
        "`python tests/make_coverage.py`.",
        "",
        "- **convs**: every `Conv1d`, `Conv2d`, `Conv3d`, transposed and deformable conv, of any subclass, found",
        "  without dyconvert. Each is converted, or left static for the reason that is given.",
        "- **blocks**, **own**: the blocks whose convs share a predictor, and the convs with a predictor of their own.",
        "- **eval**, **train**: the largest difference of the outputs before and after, relative to the largest",
        "  output, in eval and in training mode with the same random numbers. In float64, where it must be below",
        f"  {FLOAT64:.0e} and {TRAINING:.0e} (batch norm over few pixels amplifies rounding), or in float32, below",
        f"  {FLOAT32:.0e}, where a model makes float32 tensors itself. A detection model's backbone, feature pyramid",
        "  and heads are compared as well, alone where its boxes are chance: ranked by scores that random weights make",
        "  nearly equal. Training mode is left out for those, and for large models.",
        f"- *planned*: over {coverage_zoo.TOO_LARGE / 1e6:.0f} million parameters, or images too large to wait for:",
        "  planned, converted and run on the meta device only.",
        "- All models have random weights. timm's are the smallest of each of its modules, with convs beside the stem",
        "  if one has any, and the smallest with each class of conv.",
        "",
        *summary([rows[case] for case in cases if case in rows]),
    ]
    for library, title in TITLES.items():
        found = [rows[case] for case in cases if case in rows and case.startswith(f"{library}:")]
        if found:
            lines += [
                "",
                f"## {title}",
                "",
                f"{len(found)} models, {share(found):.1%} of {total(found, 'counted')} convs."
                if total(found, "counted")
                else "",
                "",
                "| model | convs | converted | left static | blocks | own | eval | train |",
                "|---|---:|---:|---|---:|---:|---:|---:|",
                *(line(row) for row in found),
            ]
    if missing := [case for case in cases if case not in rows]:
        lines += ["", f"Not measured yet: {', '.join(missing)}."]
    lines += _of_other_methods()
    lines += ["", *_of_packages()]
    TABLE.write_text("\n".join(lines) + "\n")
    print(f"{TABLE}: {len(cases) - len(missing)} of {len(cases)} models")


def _of_other_methods() -> list[str]:
    lines = []
    for method in METHODS:
        rows = list(sweep_of(method).measured().values())
        if method == "dynet" or not rows:
            continue
        compared = [row for row in rows if row.difference is not None]
        exact = [row for row in compared if row.precision == "float64"]
        largest = exponent(max((row.difference for row in exact), default=None))
        trained = exponent(max((row.training for row in exact if row.training is not None), default=None))
        wrong = [row.case for row in rows if row.problems]
        lines += [
            "",
            f"## {METHODS[method].title or method}",
            "",
            f"`python tests/make_coverage.py --method {method}`: the models for which the table above took at most "
            f"{QUICK} s, the quickest first. {len(rows)} models, {share(rows):.1%} of {total(rows, 'counted')} convs "
            f"become dynamic. {len(compared)} were run before and after: the largest difference in float64 is "
            f"{largest} in eval mode and {trained} in training mode. "
            + (f"Problems: {', '.join(wrong)}." if wrong else "There were no problems."),
            "",
            "| model | convs | converted | eval | train |",
            "|---|---:|---:|---:|---:|",
        ]
        for row in rows:
            difference = row.precision if row.difference is None else exponent(row.difference)
            lines.append(f"| {row.case} | {row.convs} | {row.converted} | {difference} | {exponent(row.training)} |")
    return lines


def _of_packages() -> list[str]:
    import packages_covering
    import packages_table
    import packages_zoo

    rows = Rows(PACKAGES, packages_covering.Row, "", 0).measured()
    packages = list(packages_zoo.table())
    wanted = sorted(packages_zoo.names(), key=lambda case: packages.index(case.partition(":")[0]))
    measured = [rows[case] for case in wanted if case in rows]
    return packages_table.section(measured, [case for case in wanted if case not in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", metavar="CASE", help=argparse.SUPPRESS)
    parser.add_argument("--again", nargs="+", default=[], metavar="CASE", help="measure these afresh")
    parser.add_argument("--table", action="store_true", help="only write the table")
    parser.add_argument("--families", action="store_true", help="choose timm's models afresh")
    parser.add_argument("--missing", action="store_true", help="measure no model twice, not even one with problems")
    parser.add_argument("--method", default="dynet", choices=METHODS, help="convert to this method")
    options = parser.parse_args()
    if options.one:
        from covering import examine

        measure_here(partial(examine, method=options.method), options.one, MEMORY)
        return
    if options.families:
        rows = [json.dumps(entry) for entry in coverage_zoo.choose_families()]
        coverage_zoo.FAMILIES.write_text("[\n  " + ",\n  ".join(rows) + "\n]\n")
        return
    if not options.table:
        cases = all_cases() if options.method == "dynet" else quick_cases()
        sweep_of(options.method).measure(cases, options.again, lambda row: row["difference"], options.missing)
    write_table()


if __name__ == "__main__":
    main()
