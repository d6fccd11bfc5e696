"""What a report says, and what it keeps to itself: differences that images or seeds can't show aren't findings."""

import csv
import io

import pytest
import torch

from dyconvert.analysis import findings
from dyconvert.analysis.ablation import Ablation, Score, Setting
from dyconvert.analysis.accuracy import Share, accuracy
from dyconvert.analysis.coefficients import Coefficients, ConvCoefficients
from dyconvert.analysis.correlation import Correlation, LayerCorrelation
from dyconvert.analysis.resolution import around
from dyconvert.report.numbers import _csv


@pytest.mark.parametrize(
    ("right", "images", "low", "high"),
    # Wilson's interval by the formula, worked out apart; at the ends it stays within 0 and 100.
    [(50, 100, 40.38, 59.62), (0, 10, 0.0, 27.75), (10, 10, 72.25, 100.0), (9000, 10000, 89.40, 90.57)],
)
def test_intervals(right, images, low, high):
    found = Share.of(right, images)
    assert (found.low, found.high) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))


def predictions(only_model: int, only_original: int, both: int):
    count = only_model + only_original + both
    labels = torch.zeros(count, dtype=torch.long)
    model, original = labels.clone(), labels.clone()
    model[only_model : only_model + only_original] = 1
    original[:only_model] = 1
    return accuracy(labels, model, original, ["cat", "dog"])


@pytest.mark.parametrize(
    ("only_model", "only_original", "says", "level"),
    [
        (0, 0, "the same 100 of 100", "note"),
        (3, 2, "don't tell the model from the original", "note"),
        (30, 5, "better than the original", "note"),
        (5, 30, "worse than the original", "warning"),
        (2000, 1000, "better than the original", "note"),
    ],
)
def test_accuracy_is_compared_as_far_as_images_can(only_model, only_original, says, level):
    [finding] = findings.of_accuracy(predictions(only_model, only_original, 100))
    assert says in finding.text
    assert finding.level == level


def test_classes_and_confusions():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    found = accuracy(labels, torch.tensor([0, 1, 1, 1, 0, 2]), labels.clone(), ["a", "b", "c", "none"])
    assert [(each.name, each.model.right, each.original.right) for each in found.classes] == [
        ("a", 1, 3),
        ("b", 1, 2),
        ("c", 1, 1),
    ]
    assert [(each.label, each.taken_for, each.model, each.original) for each in found.confusions] == [
        ("a", "b", 2, 0),
        ("b", "a", 1, 0),
    ]


def correlation(mean: float) -> Correlation:
    return Correlation.model_construct(mean_absolute=mean, strongest=[], constant=[])


@pytest.mark.parametrize(
    ("ours", "says"), [(0.299, "as in the original"), (0.305, "as in"), (0.25, "less"), (0.4, "more")]
)
def test_small_differences_of_correlation_are_none(ours, says):
    layer = LayerCorrelation.model_construct(layer="x", why="", model=correlation(ours), original=correlation(0.3))
    [finding] = findings.of_correlations([layer])
    assert says in finding.text


@pytest.mark.parametrize(("share", "said"), [(0.08, False), (0.10, False), (0.30, True)])
def test_classes_are_named_only_above_chance(share, said):
    conv = ConvCoefficients.model_construct(
        name="c",
        g=2,
        experts=[],
        spread=0.1,
        between_classes=share,
        by_chance=0.09,
        unused=[],
        saturated=0.0,
        constant=0.0,
    )
    found = findings.of_coefficients(Coefficients.model_construct(convs=[conv], unreached=[]))
    assert any("follow the class" in each.text for each in found) == said


def setting(run: str, mean: float, deviation: float, runs: int, static: bool = False) -> Setting:
    spread = Score(mean=mean, deviation=deviation, low=mean, high=mean, runs=runs)
    return Setting(
        run=run,
        recipe="r",
        method="",
        g=None,
        width=None,
        static=static,
        epochs=2,
        scores={"finetuned": spread},
        costs={},
    )


@pytest.mark.parametrize(
    ("deviation", "runs", "says"),
    [(0.1, 3, "more than twice the standard error"), (1.0, 3, "no difference"), (0.0, 1, "Run more seeds")],
)
def test_the_static_control_stands_beside_the_dynamic_runs(deviation, runs, says):
    control = setting("static", 90.0, deviation, runs, static=True)
    [finding] = findings.of_control(Ablation(file="", settings=[control, setting("g=4", 90.9, deviation, runs)]))
    assert says in finding.text
    assert "static 90.00 %" in finding.text
    assert not findings.of_control(Ablation(file="", settings=[setting("g=4", 90.9, deviation, runs)]))


@pytest.mark.parametrize(
    ("side", "sizes"), [(224, (128, 160, 224, 320, 448)), (32, (16, 24, 32, 48, 64)), (8, (4, 8, 12, 16))]
)
def test_sizes_around_the_models_own(side, sizes):
    assert around(torch.zeros(1, 3, side, side)) == sizes


@pytest.mark.parametrize("name", ["=1+1", "+cmd", "-2", "@SUM(A1)", "\tx"])
def test_class_names_are_no_formulas_in_a_spreadsheet(name):
    [row] = csv.DictReader(io.StringIO(_csv([{"class": name, "percent": -2.5}])))
    assert row == {"class": f"'{name}", "percent": "-2.5"}
