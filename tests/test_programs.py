"""Whatever is written in a forward, the conversion computes the same, or says what it refuses."""

import pytest
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from program_checks import examine
from program_patterns import PATTERNS, STYLES
from random_programs import Program, alone, programs

METHODS = ("dynet", "condconv", "dyconv")
KINDS = [*PATTERNS, *(f"style: {style}" for style in STYLES)]

# What is known to be wrong, and why; no random program has it.
FORWARDS = "blocks' forwards are generated, or the conv is not the one that others hold"
FAULTY: dict[str, str] = {
    "branch: isinstance": FORWARDS,
    "branch: hasattr": FORWARDS,
    "branch: type(x) is": FORWARDS,
    "branch: dict by shape": FORWARDS,
    "branch: try": FORWARDS,
    "branch: is_grad_enabled": FORWARDS,
    "branch: isinstance of layers": FORWARDS,
    "branch: type of layers": FORWARDS,
    "branch: name of layers' class": FORWARDS,
    "branch: NumPy scalar": FORWARDS,
    "branch: keys that are no names": FORWARDS,
    "context: no_grad": FORWARDS,
    "context: set_grad_enabled": FORWARDS,
    "in place: alias": FORWARDS,
    "in place: written to its input": FORWARDS,
    "state: list that grows": FORWARDS,
    "state: teacher that follows": FORWARDS,
    "random: NumPy's": FORWARDS,
    "random: Python's": FORWARDS,
    "random: Python generator of its own": FORWARDS,
    "random: NumPy generator of its own": FORWARDS,
    "random: layers shuffled": FORWARDS,
    "batch: groups folded": FORWARDS,
    "batch: windows": FORWARDS,
    "batch: time folded": FORWARDS,
    "batch: channels folded": FORWARDS,
    "batch: pairs": FORWARDS,
    "batch: repeated": FORWARDS,
    "batch: halves": FORWARDS,
    "batch: reversed": FORWARDS,
    "batch: rolled": FORWARDS,
    "batch: shuffled": FORWARDS,
    "batch: sorted": FORWARDS,
    "batch: chosen": FORWARDS,
    "batch: first alone": FORWARDS,
    "batch: without a batch": FORWARDS,
    "batch: empty batch": FORWARDS,
    "function: straight-through": FORWARDS,
    "function: gradient reversal": FORWARDS,
    "weight: equalised": FORWARDS,
    "weight: equalised in a module": FORWARDS,
    "weight: central difference": FORWARDS,
    "weight: tied decoder": FORWARDS,
    "weight: shape": FORWARDS,
    "weight: penalty": FORWARDS,
    "weight: norm of its data": FORWARDS,
    "weight: bias": FORWARDS,
    "weight: parameters counted": FORWARDS,
    "weight: size of a parameter": FORWARDS,
    "weight: tied biases": FORWARDS,
    "weight: weight of a linear": FORWARDS,
    "weight: hook on the weight": FORWARDS,
    "weight: pruned by hand": FORWARDS,
    "conv: _conv_forward": FORWARDS,
    "conv: forward": FORWARDS,
    "conv: a class without": FORWARDS,
    "conv: in a plain list": FORWARDS,
    "conv: in a plain dict": FORWARDS,
    "conv: in a tuple of tuples": FORWARDS,
    "conv: a hidden attribute": FORWARDS,
    "conv: a partial": FORWARDS,
    "conv: a bound forward": FORWARDS,
    "conv: called by keyword": FORWARDS,
    "conv: two names": FORWARDS,
    "conv: two lists": FORWARDS,
    "style: no_grad decorator": FORWARDS,
    "style: instance forward": FORWARDS,
    "style: argument that is None": FORWARDS,
    "style: children counted": FORWARDS,
    "style: attribute called coefficient_predictor": FORWARDS,
    "style: input written to": FORWARDS,
}

# How many random programs for each method: sharing a predictor is what most can go wrong with.
COUNTS = {"dynet": 300, "condconv": 120, "dyconv": 100}


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.xfail(reason=FAULTY[kind], strict=True) if kind in FAULTY else ())
        for kind in KINDS
    ],
)
def test_each_kind_by_itself(kind: str) -> None:
    for method in METHODS:
        program = alone(kind, method)
        assert examine(program).faults == [], program.source()


@pytest.mark.parametrize("method", METHODS)
def test_random_programs(method: str) -> None:
    @settings(
        max_examples=COUNTS[method],
        deadline=None,
        derandomize=True,
        database=None,
        # Not made smaller: a program is short, and that takes minutes.
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )
    @given(programs(st.just(method), *_kinds()))
    def run(program: Program) -> None:
        outcome = examine(program)
        event("refused" if outcome.refused else f"{outcome.shared > 0} shared, {outcome.own > 0} own")
        assert outcome.faults == [], program.source()

    run()


def _kinds() -> tuple[list[str], list[str]]:
    styles = [style for style in STYLES if f"style: {style}" not in FAULTY]
    return [kind for kind in PATTERNS if kind not in FAULTY], styles
