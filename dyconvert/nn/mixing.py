"""Mixing: the kernel of each image from the bank and its coefficients (DyNet, eq. 1), and its gradients.

Mixing is bound by memory, not by arithmetic. A matmul reads the bank once for coefficients per layer. With one
per output channel it is a batch of C_out matmuls, which pays for long kernels only; for short ones, g
passes of elementwise multiply-adds are faster.
"""

import torch
from torch import Tensor

# Elements of one output channel's kernel from which on a matmul per output channel is the faster way.
LONG = 1024
# Elements of a bank up to which two calls that make a copy of it beat g calls that don't.
_SMALL = 2**18


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
    flat = bank.reshape(g, channels, -1)
    if coefficients.shape[2] == 1:
        mixed = coefficients.flatten(1) @ flat.flatten(1)  # [N, g] @ [g, C_out K]
    else:
        mixed = torch.einsum("ngt,gtk->ntk", coefficients, flat)
    return mixed.view(-1, *bank.shape[1:])


def mix_into(out: Tensor, bank: Tensor, coefficients: Tensor) -> Tensor:
    """As :func:`mix`, into memory that is used again; not differentiable.

    Args:
        out: `[N, C_out, K]`, contiguous.
        bank: `[g, C_out, K]`, each expert contiguous.
        coefficients: `[N, g, 1]` or `[N, g, C_out]`.
    """
    if coefficients.shape[2] == 1:
        torch.mm(coefficients.flatten(1), bank.flatten(1), out=out.flatten(1))
    elif out.shape[2] >= LONG and out.shape[0] > 1:
        torch.bmm(coefficients.permute(2, 0, 1), bank.transpose(0, 1), out=out.transpose(0, 1))
    else:
        eta = coefficients.unsqueeze(3)  # [N, g, C_out, 1]
        torch.mul(bank[0], eta[:, 0], out=out)
        for i in range(1, bank.shape[0]):
            out.addcmul_(bank[i], eta[:, i])
    return out


def mix_one(bank: Tensor, coefficients: Tensor) -> Tensor:
    """As :func:`mix` for one image, not differentiable: what reading the bank costs, and little more.

    Args:
        bank: `[g, C_out, K]`, contiguous.
        coefficients: `[1, g, 1]` or `[1, g, C_out]`.

    Returns:
        the `C_out K` elements of `[C_out, K]`, in some shape
    """
    if coefficients.shape[2] == 1:
        if bank.numel() < _SMALL:
            return torch.mm(coefficients.squeeze(2), bank.flatten(1))
        return torch.mv(bank.flatten(1).t(), coefficients.flatten())
    eta = coefficients.squeeze(0).unsqueeze(2)  # [g, C_out, 1]
    if bank.numel() < _SMALL:
        return (bank * eta).sum(0)
    return mix_into(bank.new_empty(1, *bank.shape[1:]), bank, coefficients)


def add_bank_gradient(grad: Tensor, kernel_grad: Tensor, coefficients: Tensor) -> None:
    """Adds the bank's gradient, `sum_n eta[n, i, t] * kernel_grad[n, t]`.

    Args:
        grad: `[g, C_out, K]`, each expert contiguous; changed in place.
        kernel_grad: `[N, C_out, K]`, contiguous.
    """
    if coefficients.shape[2] == 1:
        grad.flatten(1).addmm_(coefficients.flatten(1).t(), kernel_grad.flatten(1))
    elif kernel_grad.shape[2] >= LONG:
        grad += torch.bmm(coefficients.permute(2, 1, 0), kernel_grad.transpose(0, 1)).transpose(0, 1)
    else:
        for i in range(grad.shape[0]):
            grad[i] += (kernel_grad * coefficients[:, i].unsqueeze(2)).sum(0)


def coefficient_gradient(bank: Tensor, kernel_grad: Tensor, per_channel: bool) -> Tensor:
    """The coefficients' gradient, `<w[i, t], kernel_grad[n, t]>`: `[N, g, C_out]`, or summed over t `[N, g, 1]`."""
    if not per_channel:
        return (kernel_grad.flatten(1) @ bank.flatten(1).t()).unsqueeze(2)
    if kernel_grad.shape[2] >= LONG:
        return torch.bmm(kernel_grad.transpose(0, 1), bank.permute(1, 2, 0)).permute(1, 2, 0)
    return torch.stack([(kernel_grad * expert).sum(2) for expert in bank], 1)
