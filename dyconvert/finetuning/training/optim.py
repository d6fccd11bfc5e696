"""Parameter groups, optimizers, and the learning rate's schedule."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dyconvert.finetuning.recipes.schema import Dynamic, Train
from dyconvert.nn import CoefficientPredictor, DynamicConv

# Adam's rate for a predictor's hidden layer, beside that of its last one. That starts at zero; the hidden layer starts
# at random weights of about 0.1, and reads what is never negative: at the full rate all of its units were soon dead.
_HIDDEN = 0.1

_PREDICTORS = ("predictors", "predictors, hidden")

# Norms of torch and of timm, whose classes needn't derive from torch's.
_NORMS = ("BatchNorm", "LayerNorm", "GroupNorm", "InstanceNorm", "RMSNorm", "FrozenBatchNorm")


def parameter_groups(model: nn.Module, train: Train, dynamic: Dynamic) -> list[dict[str, Any]]:
    """Groups by weight decay and learning rate: `params`, `lr`, `weight_decay`, and a `name`.

    Norms, biases and predictors aren't decayed, unless `train.decay_exclude` says otherwise: decay pulls a
    predictor's logits to zero, where all experts weigh the same.
    """
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    seen: set[int] = set()
    coefficients = {m.g: m.initial_coefficient for m in model.modules() if isinstance(m, CoefficientPredictor)}
    for module, kind in _kinds(model):
        rate, decay = train.lr, train.weight_decay
        if kind == "experts":
            factor = expert_lr(module.g, coefficients[module.g], train, dynamic)
            # What a step takes off a weight is its rate times its decay: the same as of the others.
            rate, decay = factor * rate, decay * dynamic.expert_decay / factor if factor else 0.0
        elif kind in _PREDICTORS:
            rate = _predictor_lr(kind, train, dynamic)
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen or not parameter.requires_grad:
                continue
            seen.add(id(parameter))
            excluded = (
                (kind in _PREDICTORS and "predictor" in train.decay_exclude)
                or (kind == "norms" and "norm" in train.decay_exclude)
                or (name.endswith("bias") and "bias" in train.decay_exclude)
            )
            # Norms' rate is the other weights' own, so they share their groups.
            which = "weights" if kind == "norms" else kind
            group = groups.setdefault(
                (which, rate, excluded),
                {
                    "name": f"{which}{', not decayed' if excluded else ''}",
                    "params": [],
                    "lr": rate,
                    "weight_decay": 0.0 if excluded else decay,
                },
            )
            group["params"].append(parameter)
    return list(groups.values())


def expert_lr(g: int, coefficient: float, train: Train, dynamic: Dynamic) -> float:
    r"""The factor on the experts' learning rate at which their mixture learns as the static conv does.

    With equal coefficients c, the gradient of each expert is c times the mixed kernel's G. A step of SGD moves each by
    -lr c G, so the mixture :math:`\sum_i c W_i` by -lr g c^2 G; a step of Adam, whose length doesn't depend on
    the gradient's, moves it g c times as far as a static weight. So the factor is 1 / (g c^2), or 1 / (g c): 2/3
    for DyNet with g = 6, and 4 for Dynamic Convolution with g = 4, which learn too fast and too slowly without it.
    """
    if dynamic.expert_lr is not None:
        return dynamic.expert_lr
    return 1 / (g * coefficient) if train.optimizer == "adamw" else 1 / (g * coefficient**2)


def _kinds(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Each module, and what its own parameters are: the names of the groups, and "norms"."""
    parts: dict[int, str] = {}
    for predictor in model.modules():
        if isinstance(predictor, CoefficientPredictor):
            parts |= {id(part): "predictors" for part in predictor.modules()}
            if predictor.hidden is not None:
                parts[id(predictor.hidden)] = "predictors, hidden"

    def kind(module: nn.Module) -> str:
        if id(module) in parts:
            return parts[id(module)]
        if isinstance(module, DynamicConv):
            return "experts"
        return "norms" if any(mark in type(module).__name__ for mark in _NORMS) else "weights"

    return [(module, kind(module)) for module in model.modules()]


def _predictor_lr(kind: str, train: Train, dynamic: Dynamic) -> float:
    if dynamic.predictor_adam is None:
        return train.lr * dynamic.predictor_lr
    return dynamic.predictor_adam * (_HIDDEN if kind == "predictors, hidden" else 1)


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
