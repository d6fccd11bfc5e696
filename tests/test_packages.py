"""Models of packages that pip installs: the table in docs/coverage.md says nothing of them that is silently wrong.

All that are installed here by `pytest -m sweep tests/test_packages.py`; a table by `python tests/make_packages.py`.
"""

import packages_zoo
import pytest
from make_packages import SWEEP, installed

# At least so many models of so many packages.
MODELS, PACKAGES = 60, 12


def test_the_table() -> None:
    rows = SWEEP.measured()
    assert not {case: row.problems for case, row in rows.items() if row.problems}
    assert set(rows) <= set(packages_zoo.names())
    assert len(rows) >= MODELS
    assert len({case.partition(":")[0] for case in rows}) >= PACKAGES


@pytest.mark.sweep
@pytest.mark.parametrize("case", installed())
def test_all(case: str) -> None:
    from packages_covering import examine

    row = examine(case)
    assert not row.problems, row
