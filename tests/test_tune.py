"""tune: the fastest strategy for each dynamic conv of a model, kept for this process."""

from collections.abc import Iterator

import pytest
import torch
from nets import FlatNet, ResidualNet, image, seeded
from torch import nn

import dyconvert
from dyconvert.nn.choice import using
from dyconvert.nn.measured_choices import Choices
from dyconvert.nn.running import STRATEGIES


@pytest.fixture(autouse=True)
def choices() -> Iterator[Choices]:
    with using(Choices()) as choices:
        yield choices


@pytest.mark.parametrize("training", [False, True])
def test_every_conv_gets_a_strategy_and_computes_the_same(training: bool, choices: Choices) -> None:
    dynamic = dyconvert.convert(seeded(ResidualNet).double()).train(training)
    x = image(3, dtype=torch.float64)
    chosen = dyconvert.tune(dynamic, x, repeats=1)
    assert set(chosen) == {conv.name for conv in dynamic.dyconvert_plan.converted}
    assert set(chosen.values()) <= set(STRATEGIES) - {"features"}
    assert {found.strategy for found in choices.items().values()} == set(chosen.values())
    tuned = dynamic.eval()(x)
    with using(Choices()):
        assert torch.allclose(tuned, dynamic(x), atol=1e-12)


def test_what_a_conv_pads_itself_is_measured_as_it_is_called() -> None:
    layers = pytest.importorskip("timm.layers")
    reflecting = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
    model = nn.Sequential(nn.Conv2d(3, 8, 1), layers.Conv2dSame(8, 8, 3, stride=2), reflecting).eval()
    assert set(dyconvert.tune(dyconvert.convert(model, example=image()), image(), repeats=1)) == {"1", "2"}


def test_transposed_convs_have_nothing_to_choose() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.ConvTranspose2d(8, 6, 2, stride=2)).eval()
    assert set(dyconvert.tune(dyconvert.convert(model, example=image()), image(), repeats=1)) == {"1"}


def test_a_static_model_is_refused() -> None:
    with pytest.raises(dyconvert.ModelError, match="no dynamic conv"):
        dyconvert.tune(seeded(FlatNet), image())
