"""Mixing: the kernel of each image from the bank and its coefficients (DyNet, eq. 1), and its gradients.

Mixing is bound by memory, not by arithmetic, so the bank should be read once. A matmul does so for coefficients
per layer. With one per output channel it is a batch of C_out matmuls, which pays only for long kernels and
several images; else an embedding bag is faster: each row of a kernel is the weighted sum of g rows of the bank.
"""

import functools

import torch
from torch import Tensor

from dyconvert.nn.mixture import Mixing
from dyconvert.torch_internals.operators import sums_of_rows

# Kernels with at least this many elements an output channel are mixed faster by a matmul per output channel.
_LONG = 2048
# Banks of at least this many elements are read faster by a matrix-vector product than by a matmul.
_LARGE = 2**18
# With several threads, banks of at least this many elements use an embedding bag, which parallelises better.
_SHARED = 2**20
# Below this many elements (images x bank), the overhead of calls dominates, so one multiply and one sum are used.
_TINY = 2**15


def mix(bank: Tensor, coefficients: Tensor) -> Tensor:
    r"""The kernel of each image, :math:`\tilde w_t = \sum_i \eta_t^i w_t^i` (DyNet, eq. 1).

    Differentiable, and made of matmuls, which the FLOP counter counts and exporters know.

    Args:
        bank: the experts, `[g, C_out, ...]`.
        coefficients: `[N, g, 1]`, or `[N, g, C_out]` for a coefficient per output channel.

    Returns:
        `[N, C_out, ...]`
    """
    g, channels = bank.shape[:2]
    if _one_loop(coefficients):
        eta = coefficients.view(g, -1, *[1] * (bank.dim() - 2))
        return (eta * bank).sum(0, keepdim=True)
    flat = bank.reshape(g, channels, -1)
    if coefficients.shape[2] == 1:
        mixed = coefficients.flatten(1) @ flat.flatten(1)  # [N, g] @ [g, C_out K]
    else:
        mixed = torch.einsum("ngt,gtk->ntk", coefficients, flat)
    return mixed.view(-1, *bank.shape[1:])


def _one_loop(coefficients: Tensor) -> bool:
    """Whether a compiler makes one loop of a product and a sum: at memory bandwidth, and in the bank's own memory
    format, which a matmul would first copy to another."""
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    images = coefficients.shape[0]
    return isinstance(images, int) and images == 1


def fast_kernels_of(bank: Tensor, mixing: Mixing, out: Tensor | None = None) -> Tensor:
    """As :func:`kernels_of`, not differentiable. Takes and returns the same memory as :func:`mix_fast`.

    Args:
        mixing: factors `[N, groups, K]`, in the order of the bank's elements.
    """
    kernels = mix_fast(bank, mixing.coefficients, out)
    if mixing.factors is not None:
        kernels.unflatten(1, (mixing.factors.shape[1], -1)).mul_(mixing.factors.unsqueeze(2))
    return kernels


def mix_fast(bank: Tensor, coefficients: Tensor, out: Tensor | None = None) -> Tensor:
    """As :func:`mix`, not differentiable: in one pass over the bank.

    Args:
        bank: `[g, C_out, K]`, each expert contiguous: some of the output channels of a contiguous bank.
        coefficients: `[N, g, 1]` or `[N, g, C_out]`.
        out: memory for `N C_out K` elements that may be used.

    Returns:
        `[N, C_out, K]`, contiguous, of the coefficients' dtype
    """
    _, channels, elements = bank.shape
    images = coefficients.shape[0]
    if bank.dtype != coefficients.dtype:
        # Half precision: the embedding bag adds up in float32, and is the one that is fast in it.
        mixed = _bags(bank, coefficients.expand(-1, -1, channels).to(bank.dtype))
        return mixed.to(coefficients.dtype) if out is None else out.copy_(mixed)
    if coefficients.shape[2] == 1:
        if images == 1 and bank.numel() >= _LARGE:
            if bank.numel() >= _SHARED and torch.get_num_threads() > 1:
                return _bags(bank, coefficients.expand(-1, -1, channels))
            return torch.mv(bank.flatten(1).t(), coefficients.flatten()).view(1, channels, elements)
        if out is not None:
            out = out.view(images, -1)
        return torch.mm(coefficients.squeeze(2), bank.flatten(1), out=out).view(images, channels, elements)
    if elements >= _LONG and images >= 8:
        out = bank.new_empty(images, channels, elements) if out is None else out.view(images, channels, elements)
        torch.bmm(coefficients.permute(2, 0, 1), bank.transpose(0, 1), out=out.transpose(0, 1))
        return out
    if images * bank.numel() < _TINY:
        return (bank * coefficients.unsqueeze(3)).sum(1)
    return _bags(bank, coefficients)


def _bags(bank: Tensor, coefficients: Tensor) -> Tensor:
    """Kernels `[N, C_out, K]` whose rows are weighted sums of the bank's; coefficients `[N, g, C_out]`."""
    g, channels, elements = bank.shape
    images = coefficients.shape[0]
    apart = bank.stride(0) // elements if g > 1 else channels
    rows = bank.as_strided(((g - 1) * apart + channels, elements), (elements, 1))
    index = _rows(g, channels, apart)
    bags = sums_of_rows(rows, index.repeat(images) if images > 1 else index, g, coefficients.transpose(1, 2))
    return bags.view(images, channels, elements)


@functools.lru_cache(maxsize=256)
def _rows(g: int, channels: int, apart: int) -> Tensor:
    """Where the experts of each output channel are: `[C_out * g]`."""
    # A cached tensor may not be one of inference mode, in which it could be asked for first.
    with torch.inference_mode(False):
        experts = torch.arange(g, dtype=torch.int32) * apart
        return (torch.arange(channels, dtype=torch.int32).unsqueeze(1) + experts).flatten()


def kernels_of(bank: Tensor, mixing: Mixing) -> Tensor:
    """The kernel of each image: mixed, and its elements multiplied by the factors; differentiable.

    Args:
        bank: `[g, C_out, C_in / groups, *kernel]`.

    Returns:
        `[N, C_out, C_in / groups, *kernel]`
    """
    kernels = mix(bank, mixing.coefficients)
    return kernels if mixing.factors is None else by_factors(kernels, mixing.factors)


def by_factors(kernels: Tensor, factors: Tensor) -> Tensor:
    """Kernels `[N, C_out, ...]` times factors `[N, groups or 1, ...]`, the same for all output channels of a group."""
    groups = factors.shape[1]
    if groups == 1:
        return kernels * factors
    return (kernels.unflatten(1, (groups, -1)) * factors.unsqueeze(2)).flatten(1, 2)


def factor_gradient(kernels: Tensor, kernel_grad: Tensor, groups: int) -> Tensor:
    """The factors' gradient, `[N, groups or 1, ...]`, from kernels that were mixed without them, `[N, C_out, ...]`."""
    return (kernels * kernel_grad).unflatten(1, (groups, -1)).sum(2)


def bank_gradient(out: Tensor, kernel_grad: Tensor, coefficients: Tensor, *, add: bool) -> None:
    """The bank's gradient, `sum_n eta[n, i, t] * kernel_grad[n, t]`, written or added to `out`.

    Args:
        out: `[g, C_out, K]`, each expert contiguous.
        kernel_grad: `[N, C_out, K]`, contiguous.
    """
    if coefficients.shape[2] == 1:
        flat = out.flatten(1)
        torch.addmm(flat, coefficients.flatten(1).t(), kernel_grad.flatten(1), beta=1 if add else 0, out=flat)
        return
    images, channels, elements = kernel_grad.shape
    if elements >= _LONG:
        gradient = torch.bmm(coefficients.permute(2, 1, 0), kernel_grad.transpose(0, 1)).transpose(0, 1)
    else:
        g = out.shape[0]
        index = _rows(images, channels, channels).repeat(g)
        gradient = sums_of_rows(kernel_grad.view(-1, elements), index, images, coefficients.permute(1, 2, 0))
        gradient = gradient.view(g, channels, elements)
    out.add_(gradient) if add else out.copy_(gradient)


def coefficient_gradient(bank: Tensor, kernel_grad: Tensor, per_channel: bool) -> Tensor:
    """The coefficients' gradient, `<w[i, t], kernel_grad[n, t]>`: `[N, g, C_out]`, or summed over t `[N, g, 1]`."""
    if not per_channel:
        return (kernel_grad.flatten(1) @ bank.flatten(1).t()).unsqueeze(2)
    if kernel_grad.shape[2] >= _LONG:
        return torch.bmm(kernel_grad.transpose(0, 1), bank.permute(1, 2, 0)).permute(1, 2, 0)
    return torch.stack([(kernel_grad * expert).sum(2) for expert in bank], 1)
