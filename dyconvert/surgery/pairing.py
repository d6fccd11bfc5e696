r"""pair_experts: exact like a fresh conversion, and dynamic from the first step.

A fresh conversion's coefficients are equal, so its experts get equal gradients, and while the experts co-operate
alike no coefficient is worth changing: a predictor that starts at zero hardly moves in a short fine-tuning.
But since :math:`\sigma(z) + \sigma(-z) = 1`, two *equal* experts with *opposite* logits add up to one of them,
whatever z is: with :math:`W_{i + g/2} = W_i` and :math:`z_{i + g/2} = -z_i`,

.. math:: \sum_{i=1}^{g} \eta^i W_i = \sum_{i=1}^{g/2} W_i = W

for every image. So the predictor may start anywhere, and the two halves of a pair get different gradients from the
first step. Where the coefficients are a softmax they add up to one, and all g experts start equal.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dyconvert.arguments import check_module
from dyconvert.copying import in_eval_mode, skeleton
from dyconvert.errors import ModelError
from dyconvert.limits import SPREAD
from dyconvert.nn import CoefficientPredictor, DynamicConv
from dyconvert.nn.convs import refuse_compressed
from dyconvert.numbers import real, seed_of
from dyconvert.surgery.watch import run_over


def pair_experts(model: nn.Module, data: Iterable[Any], *, spread: float = 1.0, seed: int = 0) -> nn.Module:
    """Let the coefficients of a freshly converted model vary from image to image, without changing its outputs.

    The predictors' last linears, which are zero, get random weights. They are scaled so that over the images of
    `data` each logit (over the temperature) has mean 0 and standard deviation `spread`. The experts become equal in
    pairs (sigmoid; with an odd g the last one stays as it is, at coefficient 0.5), or all equal (softmax). With
    g = 1 nothing can be paired, and the model stays as it is.

    Args:
        model: what :func:`~dyconvert.convert` returned, not trained yet; changed in place, in its values only.
        data: a data loader, or any iterable of batches, as :func:`~dyconvert.collapse` takes them. A few hundred
            images will do.
        spread: standard deviation of the logits; 1 gives coefficients (sigmoid) of 0.5 +- 0.2.
        seed: of the directions in which the predictors look. The global generator isn't used.

    Returns:
        The model.

    Raises:
        ModelError: nothing in the model is dynamic, or it is compressed, or its predictors were trained; no batch was
            given, or the model rejects one; what the predictors read isn't finite. The model is as it was.
        PlanError: the seed or the spread is out of range.
    """
    seed, spread = seed_of(seed), real("spread", spread, 0, SPREAD)
    check_module(model)
    predictors = {name: m for name, m in model.named_modules() if isinstance(m, CoefficientPredictor)}
    if not predictors:
        raise ModelError(f"{type(model).__name__} has no dynamic conv, so there are no experts to pair.")
    refuse_compressed(model)
    for name, predictor in predictors.items():
        if predictor.linear.weight.any() or predictor.linear.bias.any():
            raise ModelError(
                f"The predictor {name} isn't at its start, so pairing the experts would change the outputs. "
                "Pair them before training."
            )
    statistics = _statistics(model, data)
    generator = torch.Generator().manual_seed(seed)
    softmax = any(predictor.activation == "softmax" for predictor in predictors.values())
    with torch.no_grad():
        for conv in (m for m in model.modules() if isinstance(m, DynamicConv) and m.g > 1):
            for bank in (conv.weight, conv.bias):
                if bank is not None:
                    _pair(bank.detach().unflatten(0, (conv.g, -1)), softmax)
        for name, predictor in predictors.items():
            # What the data never reached keeps its zero logits.
            if predictor.g > 1 and name in statistics:
                _aim(predictor, *statistics[name], spread, generator)
    return model


def _pair(experts: Tensor, softmax: bool) -> None:
    """Make experts `[g, ...]` equal, all of them or in pairs, in place; their mixture stays the same."""
    half = len(experts) // 2
    if softmax:
        experts.copy_(experts.double().mean(0).expand_as(experts))
        return
    # All at coefficient 0.5. In float64, for the differences of the experts are to cancel.
    kernel = 0.5 * experts.double().sum(0)
    paired = experts[:half].to(torch.float64, copy=True)
    alone = 0.5 * experts[2 * half :].double().sum(0)  # of an odd g; else 0
    paired += (kernel - alone - paired.sum(0)) / half
    experts[: 2 * half].unflatten(0, (2, half)).copy_(paired)


def _statistics(model: nn.Module, data: Iterable[Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean `[K]` and covariance `[K, K]`, over the images, of what each predictor's last linear reads."""
    runner = in_eval_mode(skeleton(model, Tensor.detach))
    sums: dict[str, Tensor] = {}

    def watch(name: str, predictor: CoefficientPredictor) -> None:
        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            u = args[0].double()
            one = torch.cat([u.new_ones(len(u), 1), u], 1)
            moments = one.T @ one
            sums[name] = sums[name] + moments if name in sums else moments

        predictor.linear.register_forward_pre_hook(add)

    for name, module in runner.named_modules():
        if isinstance(module, CoefficientPredictor):
            watch(name, module)
    run_over(runner, data)
    statistics = {}
    for name, moments in sums.items():
        if not moments.isfinite().all():
            raise ModelError(f"What the predictor {name} reads isn't finite. Look for NaN in the images or weights.")
        mean = moments[0, 1:] / moments[0, 0]
        statistics[name] = mean, moments[1:, 1:] / moments[0, 0] - mean.outer(mean)
    return statistics


def _aim(
    predictor: CoefficientPredictor, mean: Tensor, covariance: Tensor, spread: float, generator: torch.Generator
) -> None:
    """Give the last linear random directions, of logits with mean 0 and standard deviation `spread`."""
    g = predictor.g
    # Pooled maps of unequal size count alike; one that is the same for every image (a dead unit) isn't looked at.
    variance = covariance.diagonal()
    each = torch.where(variance > 1e-12 * variance.max(), variance.clamp(min=1e-30).rsqrt(), 0.0)
    drawn = g if predictor.activation == "softmax" else g // 2
    start = 0
    for size in predictor.sizes:
        channels = size.per
        d = torch.randn(drawn * channels, len(mean), generator=generator, dtype=torch.float64).to(mean.device) * each
        deviation = ((d @ covariance) * d).sum(1, keepdim=True).clamp(min=0).sqrt()
        d = torch.where(deviation > 0, d * spread / deviation, 0.0) * predictor.temperature.double()
        weight = torch.cat([d, -d])[: g * channels] if drawn < g else d
        rows = slice(start, start + len(weight))
        predictor.linear.weight[rows] = weight.to(predictor.linear.weight.dtype)
        predictor.linear.bias[rows] = -(weight @ mean).to(predictor.linear.bias.dtype)
        start += size.total
