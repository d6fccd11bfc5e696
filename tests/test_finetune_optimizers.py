"""Predictors with an optimizer of their own."""

import copy

import torch
from finetune_nets import recipe
from nets import ResidualNet, seeded

import dyconvert
from dyconvert import CoefficientPredictor, finetune
from dyconvert.finetuning.optim import make_optimizer
from dyconvert.finetuning.schema import Dynamic, Train


def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.ones(2, 3, 16, 16)).square().sum().backward()
        optimizer.step()


def test_a_schedule_reaches_both_and_a_checkpoint_restores_both():
    model = dyconvert.convert(seeded(ResidualNet), g=2).eval()
    settings = Train(lr=0.01, momentum=0.9), Dynamic(predictor_adam=0.003)
    optimizer = make_optimizer(model, *settings)
    assert {group["lr"] for group in optimizer.param_groups} == {0.01, 0.003}
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    steps(model, optimizer, 2)
    schedule.step()
    again = copy.deepcopy(model)
    restored = make_optimizer(again, *settings)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert {group["lr"] for group in restored.param_groups} == {0.005, 0.0015}
    steps(model, optimizer, 2)
    steps(again, restored, 2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_adam_moves_the_predictors_where_sgd_leaves_them(tmp_path):
    def largest(name: str, *overrides: str) -> float:
        (tmp_path / name).mkdir()
        made = recipe(tmp_path / name, "train.max_steps=3", *overrides)
        finetune(made, progress=False)
        model = dyconvert.load(made.directory / "last", trust_code=True)
        predictors = [m for m in model.modules() if isinstance(m, CoefficientPredictor)]
        return max(p.linear.weight.abs().max().item() for p in predictors)

    # Adam's first steps are as long as its learning rate, however small the gradient.
    assert largest("adam", "dynamic.predictor_adam=0.01") > 5 * largest("sgd")
