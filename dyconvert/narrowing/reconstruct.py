"""Weights that reproduce the original's outputs from the narrowed model's inputs, layer by layer.

One pass through the narrowed model, with all calibration images at once: each layer is solved when the data gets to
it, so it reads what the layers before it, already solved, make. It is aimed at the original's output at the kept
channels: behind its batch norm, and with what a residual sum adds taken away as the narrowed model has it, so that a
layer makes up for the errors of those before.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd

from dyconvert.narrowing.calibrate import Positions
from dyconvert.narrowing.cut import Folds
from dyconvert.narrowing.flow import Aim, Listener, find_aims
from dyconvert.nn.padding import TF_SAME, amounts_of_padding, pad_tf_same
from dyconvert.surgery.adapters import is_standardised, static_padding, unsupported

# Relative to the inputs' mean variance: enough against noise, far below what carries signal.
RIDGE = 1e-2


@dataclass
class Solution:
    """A layer's weights as :func:`solve` finds them.

    Attributes:
        weight: `[groups, F, C_out / groups]`: from the inputs, less their mean, to the outputs, less theirs.
        mean_in: `[groups, F]`.
        mean_out: `[C_out]`.
        variance: `[C_out]`: of the outputs that these weights give.
    """

    weight: Tensor
    mean_in: Tensor
    mean_out: Tensor
    variance: Tensor


ROUNDS = 10


def solve(
    x: Tensor,
    z: Tensor,
    prior: Tensor,
    *,
    center: bool,
    ridge: float = RIDGE,
    clamp: tuple[float, float] | None = None,
    added: Tensor | None = None,
) -> Solution:
    """Ridge regression towards a prior, for each group of a grouped conv.

    Minimises ``|x W - z|^2 / P + ridge * mean(var x) * |W - prior|^2``, in float64.

    Args:
        x: `[P, groups, F]`: what the narrowed layer reads.
        z: `[P, C_out]`: what the original computes.
        prior: `[groups, F, C_out / groups]`: what the weights are where the images don't tell.
        center: with a bias, which takes the means.
    """
    groups = x.shape[1]
    mean_in = x.mean(0) if center else x.new_zeros(x.shape[1:])
    mean_out = z.mean(0) if center else z.new_zeros(z.shape[1:])
    left = (x - mean_in).transpose(0, 1)  # [g, P, F]
    right = (z - mean_out).unflatten(1, (groups, -1)).transpose(0, 1)  # [g, P, C]
    count = len(x)
    gram = (left.mT @ left).double() / count
    cross = (left.mT @ right).double() / count
    scale = gram.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12) * ridge
    regular = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device) * scale.view(-1, 1, 1)
    factor = torch.linalg.cholesky(gram + regular)
    weight = torch.cholesky_solve(cross + scale.view(-1, 1, 1) * prior.double(), factor)
    if clamp is not None:
        low, high = clamp
        base = 0 if added is None else added
        whole = z + base
        below, above = whole <= low, whole >= high
        for _ in range(ROUNDS):
            made = (left @ weight.float()).transpose(0, 1).flatten(1) + mean_out + base
            # What the activation cuts off anyway needs no more than to be cut off.
            moved = torch.where(below, made.clamp(max=low), torch.where(above, made.clamp(min=high), whole)) - base
            mean_out = moved.mean(0) if center else mean_out
            right = (moved - mean_out).unflatten(1, (groups, -1)).transpose(0, 1)
            cross = (left.mT @ right).double() / count
            weight = torch.cholesky_solve(cross + scale.view(-1, 1, 1) * prior.double(), factor)
    variance = torch.einsum("gfc,gfe,gec->gc", weight, gram, weight).flatten()
    return Solution(weight, mean_in.double(), mean_out.double(), variance)


def patches(conv: nn.Module, x: Tensor, positions: Positions) -> Tensor:
    """What a layer multiplies its weights with at the sampled positions of its output.

    Returns:
        `[P, groups, F]`, F in the order of the weight's dimensions.
    """
    if isinstance(conv, nn.Linear):
        return positions.take(x, channels_first=False).unsqueeze(1)
    padding = static_padding(conv)
    if padding == TF_SAME:
        x = pad_tf_same(x, conv.kernel_size, conv.stride, conv.dilation)
    else:
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = F.pad(x, amounts_of_padding(conv.kernel_size, padding, conv.dilation), mode=mode)
    geometry = list(zip(x.shape[2:], conv.kernel_size, conv.stride, conv.dilation, strict=True))
    spatial = tuple((size - (kernel - 1) * spread - 1) // step + 1 for size, kernel, step, spread in geometry)
    image, *place = torch.unravel_index(positions.of(spatial).to(x.device), (len(x), *spatial))
    starts = [p * step for p, (_, _, step, _) in zip(place, geometry, strict=True)]
    offsets = torch.cartesian_prod(*(torch.arange(kernel) * spread for _, kernel, _, spread in geometry))
    channels_last = x.movedim(1, -1)
    taken = [
        channels_last[(image, *(s + int(o) for s, o in zip(starts, offset, strict=True)))]
        for offset in offsets.view(-1, len(geometry))
    ]
    return torch.stack(taken, 2).unflatten(1, (conv.groups, -1)).flatten(2)


def reconstruct(
    model: nn.Module,
    images: Tensor,
    targets: dict[str, Tensor],
    folds: Folds,
    positions: Positions,
    progress: Callable[[int, int], None],
    *,
    ridge: float = RIDGE,
) -> None:
    """Solve the weights of a narrowed model, in place.

    Args:
        model: as :func:`~dyconvert.narrowing.cut.cut` leaves it, in eval mode.
        images: the calibration images, `[N, ...]`, all at once.
        targets: the original's outputs at its layers' aims, `[P, C]`, before narrowing.
        positions: where `targets` were sampled.
    """
    aims = {name: aim for name, aim in find_aims(model, (images[:1],)).items() if name in targets}
    norms = {aim.norm for aim in aims.values() if aim.norm}
    others: dict[int, Tensor] = {}
    wanted: dict[int, list[Callable[[Tensor], None]]] = {}
    for number in {aim.other for aim in aims.values() if aim.other is not None}:
        wanted[number] = [lambda t, number=number: others.update({number: t})]
    last = {aim.other: name for name, aim in aims.items()}
    done = 0

    def solve_layer(name: str, aim: Aim) -> Callable[..., None]:
        @_outside_of_the_watch
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            nonlocal done
            target = targets.pop(name)
            target = target[:, folds.get(name, "out", target.shape[1]).kept]
            added = None
            if aim.other is not None:
                added = positions.take(others[aim.other], aim.channels_first)
                target = target - added
                if last[aim.other] == name:
                    del others[aim.other]
            norm = model.get_submodule(aim.norm) if aim.norm else None
            _fit(module, norm, patches(module, args[0], positions), target, ridge, aim.clamp, added)
            done += 1
            progress(done, len(aims))

        return hook

    handles = []
    for name, module in model.named_modules():
        if name in aims and _solvable(module):
            handles.append(module.register_forward_pre_hook(solve_layer(name, aims[name])))
        elif isinstance(module, _BatchNorm) and name not in norms:
            handles.append(module.register_forward_pre_hook(_outside_of_the_watch(_restate)))
    try:
        with torch.no_grad(), Listener(wanted):
            model(images)
    finally:
        for handle in handles:
            handle.remove()


def _outside_of_the_watch(hook: Callable[..., None]) -> Callable[..., None]:
    """A hook's own operators aren't the model's, and aren't counted."""

    def wrapped(*args: Any) -> None:
        with torch.utils._python_dispatch._disable_current_modes():
            hook(*args)

    return wrapped


def _solvable(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return type(module).forward is nn.Linear.forward
    return not isinstance(module, _ConvTransposeNd) and unsupported(module) is None and not is_standardised(module)


def _fit(layer: nn.Module, norm: nn.Module | None, x: Tensor, z: Tensor, ridge: float, clamp: Any, added: Any) -> None:
    """Give a layer, and the batch norm behind it, weights that make `z` `[P, C_out]` of `x` `[P, groups, F]`."""
    groups = x.shape[1]
    rows = layer.weight.detach().double().flatten(1)  # [C, F]
    factor = _factor(norm) if norm is not None else rows.new_ones(len(rows))
    prior = (rows * factor.unsqueeze(1)).unflatten(0, (groups, -1)).transpose(1, 2)  # [g, F, C]
    found = solve(x, z, prior, center=norm is not None or layer.bias is not None, ridge=ridge, clamp=clamp, added=added)
    effective = found.weight.transpose(1, 2).flatten(0, 1)  # [C, F]
    mean = (found.weight.transpose(1, 2) @ found.mean_in.unsqueeze(2)).flatten()
    if norm is None:
        layer.weight.copy_(effective.view_as(layer.weight))
        if layer.bias is not None:
            layer.bias.copy_(found.mean_out - mean)
        return
    # In the scale that the layer had, with the statistics and the affine map to match: in training mode, whose
    # statistics are the batch's, the batch norm computes nearly the same.
    layer.weight.copy_((effective / factor.unsqueeze(1)).view_as(layer.weight))
    if layer.bias is not None:
        layer.bias.zero_()
    variance = found.variance / factor.square()
    if norm.affine:
        norm.running_mean.copy_(mean / factor)
        norm.running_var.copy_(variance)
        norm.weight.copy_((variance + norm.eps).sqrt() * factor)
        norm.bias.copy_(found.mean_out)
    else:
        size = (norm.running_var.double() + norm.eps).sqrt()
        norm.running_mean.copy_(mean / factor - found.mean_out * size)


def _factor(norm: nn.Module) -> Tensor:
    """What a batch norm multiplies each channel by, `[C]`; never near zero."""
    gain = norm.weight.detach().double() if norm.affine else torch.ones_like(norm.running_var, dtype=torch.float64)
    factor = gain / (norm.running_var.double() + norm.eps).sqrt()
    typical = factor.abs().mean().clamp(min=1e-6)
    return torch.where(factor.abs() < 1e-3 * typical, typical, factor)


def _restate(norm: nn.Module, args: tuple[Any, ...]) -> None:
    """Re-estimate a batch norm's statistics on what it now reads, without a change in what it computes."""
    if not norm.affine or norm.running_mean is None:
        return
    x = args[0]
    dims = [d for d in range(x.dim()) if d != 1]
    variance, mean = torch.var_mean(x, dims, correction=0)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    norm.bias.add_(scale * (mean - norm.running_mean))
    norm.weight.copy_(scale * (variance + norm.eps).sqrt())
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
