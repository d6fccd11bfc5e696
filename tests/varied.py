"""Converted models whose coefficients really vary from image to image, and whose batch norms aren't neutral."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import dyconvert


def randomised(model: nn.Module, std: float = 0.5) -> nn.Module:
    """Random predictors: logits of about `3 * std` times what they read, before the temperature. In place.

    Scaled by the number of inputs, as an initialiser does: else a wide model's coefficients are all 0 or 1, and the
    least rounding switches them.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(1)
        for module in model.modules():
            if isinstance(module, dyconvert.CoefficientPredictor):
                size = std * module.temperature.item()
                nn.init.normal_(module.linear.weight, std=3 * size / module.linear.in_features**0.5)
                nn.init.normal_(module.linear.bias, std=size)
    return model


def with_statistics(model: nn.Module, images: Tensor | None = None) -> nn.Module:
    """Batch norms with scales and shifts as training leaves them, and the statistics of `images`. In place.

    Without images the statistics are random, which only a shallow model bears.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    with torch.random.fork_rng(devices=()), torch.no_grad():
        torch.manual_seed(2)
        for norm in norms:
            norm.running_mean.normal_(0, 0.2)
            norm.running_var.uniform_(0.5, 1.5)
            if norm.affine:
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.normal_(0, 0.2)
        if images is not None:
            for norm in norms:
                norm.train().momentum = 1.0
            model(images)
            for norm in norms:
                norm.eval().momentum = 0.1
    return model


def coefficient_spread(model: nn.Module, images: Tensor) -> float:
    """How far the coefficients differ from image to image: their standard deviation, the median over predictors."""
    spreads = []
    handles = [
        module.register_forward_hook(lambda module, args, out: spreads.append(out[0].experts.std(0).mean().item()))
        for module in model.modules()
        if isinstance(module, dyconvert.CoefficientPredictor)
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return sorted(spreads)[len(spreads) // 2]
