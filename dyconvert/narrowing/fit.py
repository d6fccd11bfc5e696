"""Gives one layer, and the batch norm behind it, weights that reproduce the original's outputs."""

import torch
from torch import Tensor, nn

from dyconvert.narrowing.patches import as_rows, as_weight
from dyconvert.narrowing.record import SolvedLayer
from dyconvert.narrowing.solve import Rows, Solution, solve
from dyconvert.torch_internals.modules import tensor_tables

SOLVED, MERGED = "least-squares", "merge"


def real_rows(t: Tensor) -> Tensor:
    """The rows in float32, or in float64 if they are in it."""
    return t if t.dtype == torch.float64 else t.float()


@torch.no_grad()
def fit_layer(name: str, layer: nn.Module, norm: nn.Module | None, rows: Rows, ridge: float) -> SolvedLayer:
    """Solve the weights of a layer, and of the batch norm behind it; keep the merged ones if they are better."""
    if rows.fitted < 2:
        return SolvedLayer(name=name, weights=MERGED, why="too few images to solve it")
    if not (rows.x.isfinite().all() and rows.z.isfinite().all()):
        return SolvedLayer(name=name, weights=MERGED, why="it reads or returns values that aren't finite")
    groups = rows.x.shape[1]
    now = as_rows(layer, layer.weight.detach().double())  # [C, F]
    if (rows.x.shape[2], rows.z.shape[1]) != (now.shape[1], now.shape[0]):
        return SolvedLayer(name=name, weights=MERGED, why="it is called with other channels than its weights are for")
    merged = rows.error(_present_outputs(layer, norm, now, rows))
    factor = _factor(norm) if norm is not None else now.new_ones(len(now))
    prior = (now * factor.unsqueeze(1)).unflatten(0, (groups, -1)).transpose(1, 2)  # [g, F, C]
    center = norm is not None or layer.bias is not None
    try:
        solution = solve(rows, [prior, torch.zeros_like(prior)], center=center, ridge=ridge)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return SolvedLayer(name=name, weights=MERGED, error=merged, why="its inputs can't be solved for")
    if merged is not None and not solution.error < merged:
        return SolvedLayer(name=name, weights=MERGED, error=merged, why="merging is better")
    changed = [layer, *([norm] if norm is not None else [])]
    tensors = [t for module in changed for table in tensor_tables(module) for t in table.values() if t is not None]
    before = [(t, t.clone()) for t in tensors]
    _write(layer, norm, solution, factor)
    if all(t.isfinite().all() for t, _ in before):
        return SolvedLayer(name=name, weights=SOLVED, error=solution.error)
    for t, value in before:
        t.copy_(value)
    return SolvedLayer(name=name, weights=MERGED, error=merged, why="its solution is out of its dtype's range")


def _present_outputs(layer: nn.Module, norm: nn.Module | None, now: Tensor, rows: Rows) -> Tensor:
    """The outputs of the layer and the batch norm behind it, with their present weights."""
    x = rows.x  # [P, g, F]
    weight = now.to(x.dtype).unflatten(0, (x.shape[1], -1)).transpose(1, 2)  # [g, F, C]
    outputs = (x.transpose(0, 1) @ weight).transpose(0, 1).flatten(1)
    if layer.bias is not None:
        outputs = outputs + layer.bias.to(x.dtype)
    if norm is None:
        return outputs
    scale = (norm.running_var.double() + norm.eps).rsqrt().to(x.dtype)
    outputs = (outputs - norm.running_mean.to(x.dtype)) * scale
    if norm.weight is not None:
        outputs = outputs * norm.weight.to(x.dtype)
    return outputs if norm.bias is None else outputs + norm.bias.to(x.dtype)


def _write(layer: nn.Module, norm: nn.Module | None, solution: Solution, factor: Tensor) -> None:
    effective = solution.weight.transpose(1, 2).flatten(0, 1)  # [C, F]
    mean = (solution.weight.transpose(1, 2) @ solution.mean_in.unsqueeze(2)).flatten()
    if norm is None:
        layer.weight.copy_(as_weight(layer, effective))
        if layer.bias is not None:
            layer.bias.copy_(solution.mean_out - mean)
        return
    # The weights keep the layer's scale, and the batch norm's statistics and affine map fit them: so in training mode,
    # with the batch's statistics, the batch norm computes nearly the same.
    layer.weight.copy_(as_weight(layer, effective / factor.unsqueeze(1)))
    if layer.bias is not None:
        layer.bias.zero_()
    if norm.weight is not None and norm.bias is not None:
        variance = solution.variance / factor.square()
        norm.running_mean.copy_(mean / factor)
        norm.running_var.copy_(variance)
        norm.weight.copy_((variance + norm.eps).sqrt() * factor)
        norm.bias.copy_(solution.mean_out)
        return
    if norm.weight is not None:
        norm.weight.copy_((norm.running_var.double() + norm.eps).sqrt() * factor)
    if norm.bias is not None:
        norm.bias.copy_(solution.mean_out)
    else:
        mean = mean - solution.mean_out
    norm.running_mean.copy_(mean / factor)


def _factor(norm: nn.Module) -> Tensor:
    """The factor of a batch norm for each channel, `[C]`; values near zero are replaced by a typical one."""
    gain = torch.ones_like(norm.running_var, dtype=torch.float64)
    if norm.weight is not None:
        gain = norm.weight.detach().double()
    factor = gain / (norm.running_var.double() + norm.eps).sqrt()
    typical = factor.abs().mean().clamp(min=1e-6)
    return torch.where(factor.abs() < 1e-3 * typical, typical, factor)


@torch.no_grad()
def restate(norm: nn.Module, x: Tensor) -> None:
    """Re-estimate a batch norm's statistics on its new input, without changing its outputs."""
    if norm.weight is None or norm.bias is None or norm.running_mean is None or x.numel() <= x.shape[1]:
        return
    dims = [d for d in range(x.dim()) if d != 1]
    variance, mean = torch.var_mean(real_rows(x), dims, correction=0)
    if not (variance.isfinite().all() and mean.isfinite().all()):
        return
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    norm.bias.add_(scale * (mean - norm.running_mean))
    norm.weight.copy_(scale * (variance + norm.eps).sqrt())
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
