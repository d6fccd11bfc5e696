"""Parameter groups, optimizers, and the learning rate's schedule."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dyconvert.finetuning.schema import Dynamic, Train
from dyconvert.nn import CoefficientPredictor

# Norms of torch and of timm, whose classes needn't derive from torch's.
_NORMS = ("BatchNorm", "LayerNorm", "GroupNorm", "InstanceNorm", "RMSNorm", "FrozenBatchNorm")


def parameter_groups(model: nn.Module, train: Train, dynamic: Dynamic) -> list[dict[str, Any]]:
    """Groups by weight decay and learning rate: `params`, `lr`, `weight_decay`, and a `name`.

    Norms, biases and predictors aren't decayed, unless `train.decay_exclude` says otherwise: decay pulls a
    predictor's logits to zero, where all experts weigh the same.
    """
    groups: dict[str, dict[str, Any]] = {}
    seen: set[int] = set()
    for module, kind in _kinds(model):
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            excluded = (
                (kind == "predictor" and "predictor" in train.decay_exclude)
                or (kind == "norm" and "norm" in train.decay_exclude)
                or (name.endswith("bias") and "bias" in train.decay_exclude)
            )
            predictor = kind == "predictor"
            key = f"{'predictors' if predictor else 'weights'}{', not decayed' if excluded else ''}"
            group = groups.setdefault(
                key,
                {
                    "name": key,
                    "params": [],
                    "lr": _rate(train, dynamic, predictor),
                    "weight_decay": 0.0 if excluded else train.weight_decay,
                },
            )
            group["params"].append(parameter)
    return list(groups.values())


def _kinds(model: nn.Module) -> list[tuple[nn.Module, str]]:
    predictors = {
        id(part) for module in model.modules() if isinstance(module, CoefficientPredictor) for part in module.modules()
    }
    return [
        (
            module,
            "predictor"
            if id(module) in predictors
            else "norm"
            if any(mark in type(module).__name__ for mark in _NORMS)
            else "weight",
        )
        for module in model.modules()
    ]


def _rate(train: Train, dynamic: Dynamic, predictor: bool) -> float:
    if not predictor:
        return train.lr
    return train.lr * dynamic.predictor_lr if dynamic.predictor_adam is None else dynamic.predictor_adam


class Together(torch.optim.Optimizer):
    """Several optimizers, each with parameters of its own, as one: for a schedule, a scaler and a checkpoint."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        # The very groups of the parts, so that a schedule's learning rates reach them.
        self.param_groups = [group for part in parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def make_optimizer(model: nn.Module, train: Train, dynamic: Dynamic) -> torch.optim.Optimizer:
    """The recipe's optimizer over the parameters that train."""
    groups = parameter_groups(model, train, dynamic)
    if dynamic.predictor_adam is None:
        return _optimizer(groups, train)
    predictors = [group for group in groups if group["name"].startswith("predictors")]
    others = [group for group in groups if not group["name"].startswith("predictors")]
    if not predictors or not others:
        return torch.optim.AdamW(predictors) if predictors else _optimizer(others, train)
    return Together(_optimizer(others, train), torch.optim.AdamW(predictors))


def _optimizer(groups: list[dict[str, Any]], train: Train) -> torch.optim.Optimizer:
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=train.lr, betas=train.betas)
    return torch.optim.SGD(groups, lr=train.lr, momentum=train.momentum, nesterov=train.nesterov)


def lr_factor(train: Train, steps: int, per_epoch: int) -> Callable[[int], float]:
    """The learning rate at a step, relative to its peak.

    Args:
        steps: optimizer steps of the run.
        per_epoch: and of an epoch.
    """
    warmup = min(round(train.warmup_epochs * per_epoch), steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = min((step - warmup) / max(steps - warmup, 1), 1.0)
        if train.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * done))
        return (1 - done) ** 0.9 if train.schedule == "poly" else 1.0

    return factor
