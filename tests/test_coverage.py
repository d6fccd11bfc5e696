"""The models of four libraries: every conv is accounted for, and the converted model computes the same.

A sample in the default run; all of them by `pytest -m sweep tests/test_coverage.py`, or as a table, by
`python tests/make_coverage.py`.
"""

import coverage_zoo
import pytest
from coverage_zoo import timm_families
from covering import Row, examine, share
from make_coverage import SWEEP

from dyconvert import METHODS

# Of the convs on maps larger than 1x1 that aren't the stem; see `Row.counted`.
SHARE = 0.95

TORCHVISION = (
    "resnet18",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "efficientnet_b0",
    "mnasnet0_5",
    "regnet_y_400mf",
    "lraspp_mobilenet_v3_large",
    "r2plus1d_18",
    "quantized_googlenet",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "ssdlite320_mobilenet_v3_large",
    "raft_small",
)
SMP = ("unet", "fpn", "deeplabv3plus")


def timm_sample(count: int = 60) -> list[str]:
    """Of timm's families those whose model is the least work, and has more convs than a stem."""
    entries = sorted((entry for entry in timm_families() if not entry["stem_only"]), key=coverage_zoo.timm_work)
    return [entry["model"] for entry in entries[:count]]


SAMPLE = [
    *(f"torchvision:{name}" for name in TORCHVISION),
    *(f"timm:{name}" for name in timm_sample()),
    *(f"smp:{name}" for name in SMP),
    *(f"hf:{name}" for name in coverage_zoo.HF),
]
# By default every fifth, so of each library.
SAMPLED = [case if index % 5 == 0 else pytest.param(case, marks=pytest.mark.sweep) for index, case in enumerate(SAMPLE)]


def needs_library(case: str) -> None:
    library = case.partition(":")[0]
    if not coverage_zoo.is_installed(library):
        pytest.skip(f"{coverage_zoo.NEEDS[library]} isn't installed")


def check(case: str, method: str = "dynet") -> Row:
    needs_library(case)
    row = examine(case, method=method)
    assert not row.problems, row
    assert row.converted + sum(row.skipped.values()) == row.convs
    return row


@pytest.mark.parametrize("case", SAMPLED)
def test_a_sample(case: str) -> None:
    row = check(case)
    assert row.converted
    table = SWEEP.measured().get(case)
    assert table is None or (row.convs, row.converted) == (table.convs, table.converted), (
        f"docs/coverage.md has other figures: python tests/make_coverage.py --again {case}"
    )


def test_timm_families_are_those_of_its_registry() -> None:
    """Those of the timm that the file was made with, or newer: a new module is to be looked at as well."""
    needs_library("timm:")
    from timm.models._registry import _module_to_models

    models = {entry["model"]: entry["module"] for entry in timm_families()}
    assert all(name in _module_to_models[module] for name, module in models.items())


def test_the_table() -> None:
    """Nothing in docs/coverage.md is unaccounted for, and the share is the one that is asked for."""
    rows = SWEEP.measured()
    wrong = {case: row.problems for case, row in rows.items() if row.problems}
    assert not wrong
    assert share(list(rows.values())) >= SHARE


@pytest.mark.sweep
def test_the_table_is_complete() -> None:
    rows = SWEEP.measured()
    assert not [case for case in everything() if case not in rows]
    assert share([rows[case] for case in SAMPLE]) >= SHARE


def everything() -> list[str]:
    libraries = [name for name in coverage_zoo.NEEDS if coverage_zoo.is_installed(name)]
    return [case for library in libraries for case in coverage_zoo.names(library)]


@pytest.mark.sweep
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", everything())
def test_all(case: str, method: str) -> None:
    check(case, method)
