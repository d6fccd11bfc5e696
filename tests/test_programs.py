"""Whatever is written in a forward, the conversion computes the same, or says what it refuses."""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from program_checks import examine
from program_patterns import PATTERNS, STYLES
from random_programs import Program, alone, programs

import dyconvert

METHODS = tuple(dyconvert.METHODS)
KINDS = [*PATTERNS, *(f"style: {style}" for style in STYLES)]

# How many random programs for each method, 500 in all: sharing a predictor is what most can go wrong with.
COUNTS = {"dynet": 230}


def each_kind() -> Iterator[Any]:
    """Every kind with the method that shares predictors, and by turns with another; with all in a sweep."""
    for index, kind in enumerate(KINDS):
        for place, method in enumerate(METHODS):
            default = place == 0 or place == 1 + index % (len(METHODS) - 1)
            yield pytest.param(kind, method, marks=() if default else pytest.mark.sweep)


@pytest.mark.parametrize(("kind", "method"), list(each_kind()))
def test_each_kind_by_itself(kind: str, method: str) -> None:
    program = alone(kind, method)
    assert examine(program).faults == [], program.source()


@pytest.mark.parametrize("method", METHODS)
def test_random_programs(method: str) -> None:
    @settings(
        max_examples=COUNTS.get(method, 90),
        deadline=None,
        derandomize=True,
        database=None,
        # Not made smaller: a program is short, and that takes minutes.
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )
    @given(programs(st.just(method), list(PATTERNS), list(STYLES)))
    def run(program: Program) -> None:
        outcome = examine(program)
        event("refused" if outcome.refused else f"{outcome.shared > 0} shared, {outcome.own > 0} own")
        assert outcome.faults == [], program.source()

    run()
