"""Measure what becomes of the models of packages that pip installs, and write their part of docs/coverage.md.

    pip install --no-deps -r tests/packages.txt       # in an environment where dyconvert's tests run
    python tests/make_packages.py                     # measure what is missing or had problems, write the table
    python tests/make_packages.py --again monai: lpips:alex    # and these: names, or how they begin
    python tests/make_packages.py --only diffusers:            # of these only

Each model is measured in a process of its own, so that one that takes too long or too much memory is only a row
that says so. Rows are kept in docs/coverage-packages.jsonl as they come. Models of packages that aren't installed
keep the rows that they have.
"""

import argparse

import make_coverage
import packages_zoo
from packages_covering import Row
from sweep_rows import Rows, measure_here

# Seconds and gigabytes for one model.
TIME = 500
MEMORY = 9

SWEEP = Rows(make_coverage.PACKAGES, Row, __file__, TIME)


def installed() -> list[str]:
    return [case for case in packages_zoo.names() if packages_zoo.is_installed(case.partition(":")[0])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", metavar="CASE", help=argparse.SUPPRESS)
    parser.add_argument("--again", nargs="+", default=[], metavar="CASE", help="measure these afresh")
    parser.add_argument("--only", nargs="+", default=[""], metavar="CASE", help="only these: names, or how they begin")
    parser.add_argument("--missing", action="store_true", help="measure no model twice, not even one with problems")
    options = parser.parse_args()
    if options.one:
        from packages_covering import examine

        measure_here(examine, options.one, MEMORY)
        return
    cases = [case for case in installed() if case.startswith(tuple(options.only))]
    SWEEP.measure(cases, options.again, lambda row: (row["eval"], row["training"], row["onnx"]), options.missing)
    make_coverage.write_table()


if __name__ == "__main__":
    main()
