"""Methods as data, and plans: every conv accounted for, printed, edited, carried over as JSON."""

import json

import pytest
import torch
import zoo
from nets import FlatNet, ResidualNet, image, same, seeded
from torch import nn

import dyconvert
from dyconvert import METHODS, Method, ModelError, Plan, PlanError
from dyconvert.nn.mixture import Sizes

STEM = "reads the image"
SEES_1X1 = "1x1 maps"


def planned(name: str, **choices) -> tuple[nn.Module, Plan]:
    """A torchvision model and its plan."""
    # Filling these with random weights takes seconds, which no plan looks at.
    with torch.device("meta" if name.startswith(("vgg", "convnext")) else "cpu"):
        model = zoo.build(name)
    return model, dyconvert.plan(model, **choices)


# ---- Methods ----


@pytest.mark.parametrize(
    ("name", "g", "per", "activation", "temperature", "scope", "hidden"),
    [
        # hidden: of a predictor that reads 256 channels, and of one that reads 32.
        ("dynet", 6, "channel", "sigmoid", 1.0, "block", (64, None)),
        ("condconv", 8, "layer", "sigmoid", 1.0, "layer", (None, None)),
        ("dyconv", 4, "layer", "softmax", 30.0, "layer", (64, 8)),
        ("odconv", 4, "layer", "softmax", 30.0, "layer", (16, 16)),
    ],
)
def test_the_papers_methods(name, g, per, activation, temperature, scope, hidden):
    method = METHODS[name]
    assert (method.g, method.per, method.activation) == (g, per, activation)
    assert (method.temperature, method.scope) == (temperature, scope)
    assert tuple(method.hidden_features(channels) for channels in (256, 32)) == hidden
    assert "arXiv:" in method.paper
    assert method.title


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_choices_reach_the_model(name):
    method = METHODS[name]
    dynamic = dyconvert.convert(seeded(ResidualNet), method=name)
    conv = dynamic.layer1[1].conv1
    predictor = conv.block_predictor if method.scope == "block" else conv.coefficient_predictor
    assert conv.weight.shape[0] == method.g * conv.out_channels
    assert predictor.activation == method.activation
    assert predictor.temperature.item() == method.temperature
    with torch.no_grad():
        mixture = predictor(torch.ones(5, predictor.in_channels, 4, 4))[0]
    assert mixture.experts.shape == (5, method.g, conv.out_channels if method.per == "channel" else 1)


def test_any_other_mixture():
    mixture = Method(name="mine", g=3, per="layer", activation="softmax", temperature=2.0, reduction=2, scope="block")
    model = seeded(ResidualNet)
    dynamic = dyconvert.convert(model, method=mixture)
    assert dynamic.layer1[0].conv1.block_predictor.sizes == (Sizes(3, 1), Sizes(3, 1))
    assert dynamic.layer1[0].conv1.block_predictor.hidden.out_features == 4
    # float32's rounding, of a sum over g experts instead of one weight.
    assert dyconvert.verify(model, dynamic, image()).relative < 1e-5


def test_one_expert_is_channel_attention():
    model = seeded(ResidualNet)
    dynamic = dyconvert.convert(model, g=1)
    conv = dynamic.layer1[0].conv1
    assert torch.equal(conv.weight, 2 * model.layer1[0].conv1.weight)  # sigmoid(0) is exactly a half
    assert dyconvert.verify(model, dynamic, image()).relative < 1e-5  # float32's rounding


@pytest.mark.parametrize(
    ("choices", "says"),
    [
        ({"method": "dynt"}, "Did you mean 'dynet'?"),
        ({"method": "conv"}, "dynet, condconv, dyconv, odconv"),
        ({"g": 0}, "g: .*greater than or equal to 1"),
        ({"g": -3}, "g: "),
        ({"method": "dyconv", "g": 1}, "one expert.*g >= 2"),
        ({"scope": "stage"}, "scope: .*'layer' or 'block'"),
        ({"temperature": 0.0}, "temperature: .*greater than or equal to 0.000001"),
        ({"reduction": -1}, "reduction: "),
    ],
)
def test_choices_that_make_no_sense(choices, says):
    with pytest.raises(PlanError, match=says):
        dyconvert.plan(seeded(FlatNet), **choices)


def test_choices_that_change_a_method():
    model = seeded(ResidualNet)
    changed = dyconvert.plan(model, "dynet", g=2, scope="layer", reduction=8, temperature=3.0).method
    assert (changed.g, changed.scope, changed.reduction, changed.temperature) == (2, "layer", 8, 3.0)
    assert METHODS["dynet"].g == 6


def test_reduction_0_is_a_single_linear():
    dynamic = dyconvert.convert(seeded(FlatNet), method="dyconv", reduction=0)
    assert dynamic.conv1.coefficient_predictor.hidden is None


# ---- What becomes of every conv ----

# The blocks are what one would name by hand; convs that see 1x1 maps are those of squeeze-excite.
TABLE = {
    "resnet18": ({"BasicBlock"}, 0),
    "mobilenet_v3_small": ({"InvertedResidual"}, 18),
    "densenet121": ({"_DenseLayer"}, 0),
    "googlenet": ({"Inception"}, 0),
    "squeezenet1_1": ({"Fire"}, 0),
    "shufflenet_v2_x0_5": ({"InvertedResidual"}, 0),
    "vgg11": (set(), 0),
    "regnet_y_400mf": ({"ResBottleneckBlock"}, 32),
    "efficientnet_b0": ({"MBConv"}, 32),
    "convnext_tiny": (set(), 0),
    "fcn_resnet50": ({"Bottleneck"}, 0),
    "r3d_18": ({"BasicBlock"}, 0),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.sweep) if name in ("fcn_resnet50", "r3d_18") else name for name in TABLE],
)
def test_every_conv_is_accounted_for(name):
    model, plan = planned(name)
    classes, see_1x1 = TABLE[name]
    convs = [n for n, m in model.named_modules() if isinstance(m, nn.modules.conv._ConvNd)]
    assert [conv.name for conv in plan.convs] == convs
    assert len(plan.converted) + len(plan.skipped) == len(convs)
    assert all(conv.reason for conv in plan.skipped)
    assert sum(plan.reasons().values()) == len(plan.skipped)
    assert {type(model.get_submodule(block.name)).__name__ for block in plan.blocks} == classes
    static = [conv for conv in plan.skipped if SEES_1X1 in conv.reason]
    assert [conv.name for conv in plan.skipped if STEM in conv.reason] == [convs[0]]
    assert len(static) == see_1x1
    assert all(max(conv.map_size) == 1 for conv in static)
    assert len(plan.skipped) == 1 + see_1x1
    assert all(conv.name.startswith(conv.block + ".") for conv in plan.converted if conv.block)
    assert bool(plan.notes()) == (not classes)  # no block among these fails to be traced


def test_the_stem_can_be_included():
    plan = dyconvert.plan(seeded(ResidualNet), include_stem=True)
    assert not plan.skipped
    assert plan["stem"].block is None


@pytest.mark.parametrize(
    ("patterns", "converted"),
    [
        ({"include": ["layer1.1.*"]}, ["layer1.1.conv1", "layer1.1.conv2", "layer1.1.shortcut"]),
        ({"include": ["layer1.1"]}, ["layer1.1.conv1", "layer1.1.conv2", "layer1.1.shortcut"]),
        ({"include": "*.conv1"}, ["layer1.0.conv1", "layer1.1.conv1"]),
        ({"exclude": ["layer1.1", "*.conv2"]}, ["layer1.0.conv1"]),
        ({"include": ["*.conv?"], "exclude": ["layer1.0.*"]}, ["layer1.1.conv1", "layer1.1.conv2"]),
    ],
)
def test_patterns(patterns, converted):
    plan = dyconvert.plan(seeded(ResidualNet), **patterns)
    assert [conv.name for conv in plan.converted] == converted
    assert len(plan.skipped) == 6 - len(converted)
    assert all("pattern" in conv.reason or STEM in conv.reason for conv in plan.skipped)


@pytest.mark.parametrize("kind", ["include", "exclude"])
def test_a_pattern_that_matches_nothing(kind):
    with pytest.raises(PlanError, match=r"No conv's name matches 'layer9'.*stem, layer1\.0\.conv1"):
        dyconvert.plan(seeded(ResidualNet), **{kind: ["layer1.*", "layer9"]})


def test_nothing_left_to_convert():
    with pytest.raises(PlanError, match=r"Not one conv.*excluded"):
        dyconvert.convert(seeded(ResidualNet), exclude=["*"])


# ---- Printed ----


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "densenet121", "googlenet"])
def test_a_printed_plan_fits_the_terminal(name, monkeypatch):
    _, plan = planned(name)
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, str(plan).splitlines())) <= 80
    monkeypatch.setenv("COLUMNS", "200")
    text = str(plan)
    assert all(f"{conv.name} " in text for conv in plan.convs)
    assert plan.summary() in text
    assert f"{len(plan.convs)} convs: {len(plan.converted)} converted, {len(plan.skipped)} skipped" in text
    assert all(reason in text for reason in plan.reasons())


# ---- Edited, and carried over ----


def test_json_round_trip():
    model = seeded(ResidualNet)
    plan = dyconvert.plan(model, "dyconv", g=3, scope="block")
    plan.skip("*.shortcut", reason="by hand")
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert str(again) == str(plan)
    assert same(dyconvert.convert(model, plan), dyconvert.convert(model, again))


def test_an_edited_plan_is_carried_out():
    model = seeded(ResidualNet)
    plan = dyconvert.plan(model)
    plan.skip("layer1.0.conv2", reason="I want it so")
    plan.unshare("layer1.1.*")
    assert plan["layer1.0.conv2"].reason == "I want it so"
    dynamic = dyconvert.convert(model, plan)
    assert type(dynamic.layer1[0].conv2) is nn.Conv2d
    assert dynamic.layer1[0].conv1.block_predictor.sizes == (Sizes(6, 8),)
    assert type(dynamic.layer1[1]) is type(model.layer1[1])
    assert all(getattr(dynamic.layer1[1], n).coefficient_predictor for n in ("conv1", "conv2", "shortcut"))
    assert dyconvert.verify(model, dynamic, image()).relative < 1e-5  # float32's rounding


def test_edits_that_match_nothing():
    plan = dyconvert.plan(seeded(ResidualNet))
    for edit in (plan.skip, plan.unshare):
        with pytest.raises(PlanError, match=r"'conv9'.*try '\*conv9\*'"):
            edit("conv9")
    with pytest.raises(PlanError, match="no conv 'conv9'"):
        plan["conv9"]


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (lambda: FlatNet(), r"'layer1\.0\.conv1', which FlatNet doesn't have"),
        (lambda: ResidualNet(width=4), r"layer1\.0\.conv1 as 3x3 8→8.*Plan this model afresh"),
        (lambda: nn.Linear(2, 2), "no convs"),
    ],
)
def test_a_plan_of_another_model(other, says):
    plan = dyconvert.plan(seeded(ResidualNet))
    model = other()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises((PlanError, ModelError), match=says):
        dyconvert.convert(model, plan, inplace=True)
    assert same(model, before)


def test_a_plan_and_choices():
    model = seeded(FlatNet)
    with pytest.raises(PlanError, match="a plan and g"):
        dyconvert.convert(model, dyconvert.plan(model), g=2)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda plan: "{" + json.dumps(plan), "Invalid JSON"),
        (lambda plan: json.dumps(plan)[:-200], "Invalid JSON"),
        (lambda plan: "[]", "."),
        (lambda plan: json.dumps(plan | {"schema_version": 3}), "schema_version"),
        (lambda plan: json.dumps(plan | {"surprise": 1}), "surprise"),
        (lambda plan: json.dumps({k: v for k, v in plan.items() if k != "convs"}), "convs"),
        (lambda plan: json.dumps(plan | {"method": plan["method"] | {"g": 0}}), r"method\.g"),
    ],
)
def test_json_that_is_no_plan(change, says):
    plan = json.loads(dyconvert.plan(seeded(FlatNet)).to_json())
    with pytest.raises(PlanError, match=f"(?s)isn't a plan.*{says}"):
        Plan.from_json(change(plan))
