"""Narrowing the smallest model of every family: the table in docs/narrowing-coverage.md says nothing that is wrong.

All of them by `pytest -m sweep tests/test_narrowing_coverage.py`, hours; a table by `python tests/make_narrowing.py`.
"""

import pytest
from make_narrowing import SWEEP
from narrowing_covering import Row, cases

pytest.importorskip("torch_pruning")

# Least squares is measured on held-out images, and taken where it is better there; on others, this much is chance.
CHANCE = 1.01


def check(row: Row) -> None:
    """Nothing is wrong in the row: narrowed as asked and no worse than by merging, or refused by name."""
    assert not row.problems, row
    if row.refused:
        return
    assert row.narrowed + sum(row.kept.values()) == row.groups
    assert row.macs <= 1
    if row.error is not None and row.merged is not None:
        assert row.error <= row.merged * CHANCE + 1e-6


@pytest.mark.parametrize("case", SWEEP.measured())
def test_the_table(case: str) -> None:
    check(SWEEP.measured()[case])


@pytest.mark.sweep
@pytest.mark.parametrize("case", cases())
def test_all(case: str) -> None:
    from narrowing_covering import examine

    check(examine(case))
