"""Predictors with an optimizer of their own."""

import copy

import pytest
import torch
from finetune_nets import recipe
from nets import ResidualNet, seeded
from torchvision.models import resnet18

import dyconvert
from dyconvert import CoefficientPredictor, finetune
from dyconvert.finetuning.recipes.schema import Dynamic, Train
from dyconvert.finetuning.training.optim import make_optimizer, parameter_groups


def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.ones(2, 3, 16, 16)).square().sum().backward()
        optimizer.step()


def test_a_schedule_reaches_both_and_a_checkpoint_restores_both():
    model = dyconvert.convert(seeded(ResidualNet), g=2).eval()
    settings = Train(lr=0.01, momentum=0.9), Dynamic(predictor_adam=0.003)
    optimizer = make_optimizer(model, *settings)
    # g = 2 experts at coefficients of 1/2 learn at twice the rate.
    assert {group["lr"] for group in optimizer.param_groups} == {0.01, 0.02, 0.003}
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    steps(model, optimizer, 2)
    schedule.step()
    again = copy.deepcopy(model)
    restored = make_optimizer(again, *settings)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert {group["lr"] for group in restored.param_groups} == {0.005, 0.01, 0.0015}
    steps(model, optimizer, 2)
    steps(again, restored, 2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


@pytest.mark.parametrize("method", dyconvert.METHODS)
def test_while_the_coefficients_stay_sgd_trains_the_mixture_as_the_static_network(method):
    static = seeded(ResidualNet).double()
    dynamic = dyconvert.convert(static, method=method, diversity=0.5)
    train = Train(lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01)
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for model in (static, dynamic):
        optimizer = make_optimizer(model.train(), train, Dynamic(predictor_lr=0))
        for _ in range(5):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    trained = dyconvert.collapse(dynamic.eval()).state_dict()
    assert trained.keys() == static.state_dict().keys()
    for name, value in static.state_dict().items():
        # Five steps of float64, each rounded otherwise.
        torch.testing.assert_close(trained[name], value, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    ("method", "optimizer", "factor"),
    [("dynet", "sgd", 2 / 3), ("dyconv", "sgd", 4), ("dynet", "adamw", 1 / 3), ("dyconv", "adamw", 1)],
)
def test_the_experts_rate_and_decay(method, optimizer, factor):
    model = dyconvert.convert(seeded(ResidualNet), method=method)
    groups = parameter_groups(model, Train(lr=0.1, weight_decay=0.01, optimizer=optimizer), Dynamic())
    (experts,) = (group for group in groups if group["name"] == "experts")
    assert experts["lr"] == pytest.approx(0.1 * factor)
    assert experts["lr"] * experts["weight_decay"] == pytest.approx(0.1 * 0.01)
    (own,) = (g for g in parameter_groups(model, Train(lr=0.1), Dynamic(expert_lr=1)) if g["name"] == "experts")
    assert own["lr"] == 0.1


def test_adam_takes_a_predictors_hidden_layer_at_a_tenth_of_its_last_ones_rate():
    model = dyconvert.convert(resnet18(num_classes=4), g=2)
    optimizer = make_optimizer(model, Train(lr=0.5), Dynamic(predictor_adam=0.01))
    rate = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    predictors = [module for module in model.modules() if isinstance(module, CoefficientPredictor)]
    assert predictors
    for predictor in predictors:
        assert rate[id(predictor.linear.weight)] == rate[id(predictor.linear.bias)] == 0.01
        assert rate[id(predictor.hidden.weight)] == rate[id(predictor.hidden.bias)] == pytest.approx(0.001)


def test_adam_moves_the_predictors_where_sgd_leaves_them(tmp_path):
    def largest(name: str, *overrides: str) -> float:
        (tmp_path / name).mkdir()
        made = recipe(tmp_path / name, "train.max_steps=3", *overrides)
        finetune(made, progress=False, trust_code=True)
        model = dyconvert.load(made.directory / "last", trust_code=True)
        predictors = [m for m in model.modules() if isinstance(m, CoefficientPredictor)]
        return max(p.linear.weight.abs().max().item() for p in predictors)

    # Adam's first steps are as long as its learning rate, however small the gradient.
    assert largest("adam", "dynamic.predictor_adam=0.01") > 5 * largest("sgd")
