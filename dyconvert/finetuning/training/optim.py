"""Parameter groups, optimizers, and the learning rate's schedule."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dyconvert.finetuning.recipes.schema import Dynamic, Train
from dyconvert.nn import CoefficientPredictor, DynamicConv

# Adam's rate for a predictor's hidden layer, relative to that of its last layer. The last layer starts at zero. The
# hidden layer starts at random weights of about 0.1, and its inputs are never negative: at the full rate, all of its
# units soon died.
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
            # A step shrinks a weight by its rate times its decay: so that it shrinks experts as it shrinks other
            # weights, the decay is divided by the rate's factor.
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
            # Norms have the same rate as other weights, so they share their groups.
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
    """Each module, with the kind of its own parameters: "norms", or the name of a group."""
    predictor_kinds: dict[int, str] = {}
    for predictor in model.modules():
        if isinstance(predictor, CoefficientPredictor):
            predictor_kinds |= {id(module): "predictors" for module in predictor.modules()}
            if predictor.hidden is not None:
                predictor_kinds[id(predictor.hidden)] = "predictors, hidden"

    def kind(module: nn.Module) -> str:
        if id(module) in predictor_kinds:
            return predictor_kinds[id(module)]
        if isinstance(module, DynamicConv):
            return "experts"
        return "norms" if any(mark in type(module).__name__ for mark in _NORMS) else "weights"

    return [(module, kind(module)) for module in model.modules()]


def _predictor_lr(kind: str, train: Train, dynamic: Dynamic) -> float:
    if dynamic.predictor_adam is None:
        return train.lr * dynamic.predictor_lr
    return dynamic.predictor_adam * (_HIDDEN if kind == "predictors, hidden" else 1)


class CombinedOptimizer(torch.optim.Optimizer):
    """Several optimizers, each with its own parameters, as one: for a schedule, a scaler and a checkpoint."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        super().__init__(self._groups(), {})
        # The same group objects as the optimizers', so that a schedule's learning rates reach them.
        self.param_groups = self._groups()

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, state_dict["parts"], strict=True):
            optimizer.load_state_dict(state)
        self.param_groups = self._groups()


def make_optimizer(model: nn.Module, train: Train, dynamic: Dynamic) -> torch.optim.Optimizer:
    """The recipe's optimizer over the parameters that train."""
    groups = parameter_groups(model, train, dynamic)
    if dynamic.predictor_adam is None:
        return _optimizer(groups, train)
    predictors = [group for group in groups if group["name"].startswith("predictors")]
    others = [group for group in groups if not group["name"].startswith("predictors")]
    if not predictors or not others:
        return torch.optim.AdamW(predictors) if predictors else _optimizer(others, train)
    return CombinedOptimizer(_optimizer(others, train), torch.optim.AdamW(predictors))


def _optimizer(groups: list[dict[str, Any]], train: Train) -> torch.optim.Optimizer:
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=train.lr, betas=train.betas)
    return torch.optim.SGD(groups, lr=train.lr, momentum=train.momentum, nesterov=train.nesterov)


def lr_factor(train: Train, steps: int, per_epoch: int) -> Callable[[int], float]:
    """The learning rate at a step, relative to its peak.

    Args:
        steps: optimizer steps of the run.
        per_epoch: optimizer steps of an epoch.
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
