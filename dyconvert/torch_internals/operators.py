"""Operators of torch's that have no public function, and the threads that its operators run on.

An eager conv calls them. So they are bound to names where a name is enough: it saves a call of Python's.
"""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

# `view` that autograd doesn't know as one: its result may be written to in place, as an activation may do to a conv's
# output. Renamed, every conv on a CPU without the compiled kernels fails.
unsafe_view = torch.ops.aten._unsafe_view


def sums_of_rows(rows: Tensor, index: Tensor, terms: int, weights: Tensor) -> Tensor:
    """Weighted sums of rows, `terms` of `index` in each: the embedding bag, which was made for this.

    torch's public `embedding_bag` checks its arguments in Python first, which takes as long as a small bank's sums.
    The order of this one's arguments isn't documented; another would fail or give other numbers.

    Args:
        rows: `[R, K]`
        index: `[B * terms]`, int32: which rows.
        weights: of as many elements.

    Returns:
        `[B, K]`
    """
    offsets = _offsets(index.shape[0], terms)
    return torch.embedding_bag(rows, index, offsets, False, 0, False, weights.reshape(-1))[0]


@functools.lru_cache(maxsize=256)
def _offsets(count: int, terms: int) -> Tensor:
    # A cached tensor may not be one of inference mode, in which it could be asked for first.
    with torch.inference_mode(False):
        return torch.arange(0, count, terms, dtype=torch.int32)


def gradients_of_images(
    grad: Tensor,
    x: Tensor,
    kernels: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    needs_x: bool,
    needs_kernels: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of one conv whose groups are the images, each with kernels of its own.

    torch's public `conv2d_input` and `conv2d_weight` compute one gradient each, in a pass of its own.

    Args:
        grad: `[N, C_out, *out]`
        x: `[N, C_in, *spatial]`
        kernels: `[N * C_out, C_in / groups, *kernel]`; only its shape matters where `needs_x` is false.

    Returns:
        Those of x and of the kernels, in their shapes; None where not needed.
    """
    grad_x, grad_kernels, _ = torch.ops.aten.convolution_backward(
        # Not `reshape`: of one image with its channels last it makes strides that convolution_backward misreads.
        grad.contiguous().view(1, -1, *grad.shape[2:]),
        x.contiguous().view(1, -1, *x.shape[2:]),
        kernels,
        None,
        stride,
        padding,
        dilation,
        False,
        [0] * (x.dim() - 2),
        groups * x.shape[0],
        [needs_x, needs_kernels, False],
    )
    return grad_x.view(x.shape) if needs_x else None, grad_kernels if needs_kernels else None


@functools.cache
def parallel_for() -> int | None:
    """The address of `torch_parallel_for`, by which the compiled kernels use torch's own threads; None: there is none.

    It is of torch's stable C interface, from 2.10 on, and Python has no name for it. Where torch's library has another
    name, the compiled kernels aren't used, and `DYCONVERT_NATIVE=1` says so.
    """
    folder = Path(torch.__file__).parent / "lib"
    for path in (*folder.glob("libtorch_cpu.so"), *folder.glob("libtorch_cpu.dylib")):
        function = getattr(ctypes.CDLL(str(path)), "torch_parallel_for", None)
        if function is not None:
            return ctypes.cast(function, ctypes.c_void_p).value
    return None


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions that multiply bfloat16 (AVX-512's or AMX), which torch's convs use.

    There is no public question for it.
    """
    return torch.cpu._is_avx512_bf16_supported()
