"""Values out of their range, from Python: one of our exception types, which names the argument; nothing is changed."""

import copy

import pytest
import torch

import dyconvert
from dyconvert import DyconvertError, PlanError, models

EXAMPLE = torch.zeros(1, 1, 8, 8)
DATA = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
HUGE = [2**64, 10**23, -(10**23)]
NO_WHOLE_NUMBERS = [0.5, True, None, "x", float("nan"), float("inf"), [], torch.zeros(2)]
NO_NUMBERS = [True, None, "x", float("nan"), float("inf"), -1, 1e308, 10**23, [], torch.zeros(2)]


@pytest.fixture(scope="module")
def static() -> torch.nn.Module:
    return models.create("builtin:digits-resnet8", "none", {"width": 2})[0]


@pytest.fixture(scope="module")
def dynamic(static) -> torch.nn.Module:
    return dyconvert.convert(static, g=2, example=EXAMPLE)


def convert(static, **choices):
    return dyconvert.convert(static, g=2, example=EXAMPLE, **choices)


def narrow(static, **choices):
    return dyconvert.narrow(static, **({"width": 0.5, "static": True, "data": DATA, "round_to": 1} | choices))


def pair_experts(dynamic, **choices):
    return dyconvert.pair_experts(copy.deepcopy(dynamic), [DATA], **choices)


@pytest.mark.parametrize("seed", HUGE + NO_WHOLE_NUMBERS, ids=repr)
def test_seeds(seed, static, dynamic):
    for call in (
        lambda: convert(static, seed=seed),
        lambda: narrow(static, seed=seed),
        lambda: pair_experts(dynamic, seed=seed),
    ):
        with pytest.raises(PlanError, match=r"(?s)seed=.* is no seed"):
            call()


@pytest.mark.parametrize("seed", [-1, 2**63 - 1, -(2**63 - 1)])
def test_large_seeds(seed, static):
    assert dyconvert.verify(static, convert(static, seed=seed), EXAMPLE).relative < 1e-3


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_sizes_of_differences(value, static, dynamic):
    with pytest.raises(PlanError, match=r"(?s)diversity="):
        convert(static, diversity=value)
    with pytest.raises(PlanError, match=r"(?s)spread="):
        pair_experts(dynamic, spread=value)


@pytest.mark.parametrize("value", [*HUGE[-1:], *NO_WHOLE_NUMBERS, 0], ids=repr)
@pytest.mark.parametrize("name", ["round_to", "calibration_images"])
def test_counts(name, value, static):
    with pytest.raises(PlanError, match=f"(?s){name}="):
        narrow(static, **{name: value})


@pytest.mark.parametrize("value", [True, "x", 0, 2, -0.5, float("nan"), [], torch.zeros(2)], ids=repr)
@pytest.mark.parametrize("name", ["width", "flops"])
def test_shares(name, value, static):
    with pytest.raises(PlanError, match=f"(?s){name}=.*a share of the original's"):
        narrow(static, **({"width": None} | {name: value}))


@pytest.mark.parametrize("value", [5, True, [None], (1, 2), b"x", float("nan")], ids=repr)
def test_patterns(value, static):
    for call in (
        lambda: convert(static, include=value),
        lambda: convert(static, exclude=value),
        lambda: narrow(static, keep=value),
        lambda: dyconvert.plan(static, example=EXAMPLE).skip(value),
    ):
        with pytest.raises(PlanError, match="of names"):
            call()


@pytest.mark.parametrize("value", [None, 5, "x", object()], ids=lambda value: type(value).__name__)
def test_what_is_no_module(value, static, dynamic, tmp_path):
    for call in (
        lambda: dyconvert.plan(value),
        lambda: dyconvert.convert(value),
        lambda: dyconvert.narrow(value, width=0.5),
        lambda: dyconvert.pair_experts(value, [DATA]),
        lambda: dyconvert.set_trainable(value, "all"),
        lambda: dyconvert.collapse(value),
        lambda: dyconvert.fuse(value),
        lambda: dyconvert.tune(value, EXAMPLE),
        lambda: dyconvert.verify(value, dynamic, EXAMPLE),
        lambda: dyconvert.verify(static, value, EXAMPLE),
        lambda: dyconvert.preprocessing(value),
        lambda: dyconvert.save(value, tmp_path / "saved"),
        lambda: dyconvert.load(tmp_path / "saved", value or 0),
        lambda: dyconvert.export_torch(value, tmp_path / "x.pt2", EXAMPLE),
    ):
        with pytest.raises(DyconvertError, match="Module"):
            call()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [None, 5, 0.5, b"x", []], ids=repr)
def test_what_is_no_path(value, dynamic):
    for call in (
        lambda: dyconvert.save(dynamic, value),
        lambda: dyconvert.load(value),
        lambda: dyconvert.load_recipe(value),
        lambda: dyconvert.export_torch(dynamic, value, EXAMPLE),
    ):
        with pytest.raises(DyconvertError, match="path"):
            call()


@pytest.mark.parametrize("value", [None, 5, 0.5, object()], ids=lambda value: type(value).__name__)
def test_what_holds_no_batches(value, static, dynamic):
    with pytest.raises(DyconvertError, match="iterable of batches"):
        dyconvert.pair_experts(copy.deepcopy(dynamic), value)
    with pytest.raises(DyconvertError, match="iterable of batches"):
        dyconvert.collapse(dynamic, value)
    if value is not None:
        with pytest.raises(DyconvertError, match="iterable of batches"):
            narrow(static, data=value)


@pytest.mark.parametrize("value", [5, [None], b"x", object()], ids=lambda value: type(value).__name__)
def test_what_overrides_nothing(value):
    with pytest.raises(DyconvertError, match="Overrides are texts"):
        dyconvert.load_recipe("quickstart", value)


@pytest.mark.parametrize("value", [5, "x", {}], ids=repr)
def test_other_kinds(value, static, dynamic, tmp_path):
    for call in (
        lambda: dyconvert.convert(static, value),
        lambda: dyconvert.plan(static, value),
        lambda: dyconvert.save(dynamic, tmp_path, source=value),
        lambda: dyconvert.save(dynamic, tmp_path, preprocessing=value),
    ):
        with pytest.raises(DyconvertError):
            call()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 0, -1, "x", 1e999], ids=repr)
def test_temperatures(value, static):
    with pytest.raises(PlanError, match="temperature"):
        dyconvert.plan(static, "dyconv", temperature=value, example=EXAMPLE)


@pytest.mark.parametrize("text", ["inf", "nan", "-inf", "0", "-1", "1e999"])
def test_temperatures_of_the_command(text, cli, tmp_path):
    ran = cli("digits-resnet8", "--method", "dyconv", "--temperature", text, "-o", "saved")
    assert ran.code == 2
    assert "temperature" in ran.said
    assert list(tmp_path.iterdir()) == []
