"""Random calls of a dynamic conv whose arguments mostly don't fit: each is refused, or computed rightly.

    python tests/native_calls.py COUNT SEED [LIBRARY]

With a library that was built for AddressSanitizer it also shows that nothing outside of a tensor is read or written.
"""

import random
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch

from dyconvert.errors import ArgumentError
from dyconvert.nn import native_library, strategies
from dyconvert.nn.dispatch import dynamic_conv
from dyconvert.nn.mixture import Mixing
from dyconvert.nn.operands import Geometry, Operands

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.complex64, torch.bool]
NAMES = ["x", "weight", "bias", "coefficients", "shift"]


def fitting_call(rng):
    """Arguments by their names, as a dynamic conv takes them."""
    kernel = rng.choice([(1, 1), (3, 3), (3, 3), (2, 5), (7, 1)])
    groups, c_in, c_out = rng.choice([(1, 3, 5), (1, 16, 24), (2, 8, 6), (6, 6, 12), (16, 16, 16)])
    batch, g = rng.choice([1, 2, 5]), rng.choice([1, 3])
    dtype = rng.choice([torch.float32, torch.float32, torch.float64])
    half = rng.choice([dtype, dtype, torch.float16, torch.bfloat16]) if dtype == torch.float32 else dtype
    generator = torch.Generator().manual_seed(rng.randrange(1000))

    def values(*shape, of=dtype):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(of)

    return {
        "x": values(batch, c_in, rng.randint(7, 14), rng.randint(7, 14)),
        "weight": values(g * c_out, c_in // groups, *kernel, of=half),
        "bias": values(g * c_out, of=half) if rng.random() < 0.5 else None,
        "coefficients": values(batch, g, rng.choice([1, c_out])),
        "stride": (rng.choice([1, 1, 2]),) * 2,
        "padding": (rng.choice([0, 1]),) * 2,
        "dilation": (1, rng.choice([1, 1, 2])),
        "groups": groups,
        "shift": values(c_out) if rng.random() < 0.3 else None,
    }


def other_size(rng, t):
    if not t.dim():
        return t
    dim = rng.randrange(t.dim())
    size = list(t.shape)
    size[dim] = rng.choice([0, 1, max(size[dim] - 1, 0), size[dim] + 1, 2 * size[dim], 7])
    return torch.randn(size).to(t.dtype)


def other_rank(rng, t):
    return rng.choice([t.unsqueeze, lambda dim: t.flatten(), lambda dim: t.sum(dim), lambda dim: t.sum()])(0)


def other_strides(rng, t):
    if not t.dim():
        return t
    kind = rng.randrange(5)
    if kind == 0:
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == 1:
        return torch.cat([t, t], -1)[..., ::2]
    if kind == 2:
        return t[:1].expand(t.shape) if len(t) else t
    if kind == 3 and t.dim() == 4:
        return t.contiguous(memory_format=torch.channels_last)
    return torch.cat([t.flatten(), t.flatten()])[1 : 1 + t.numel()].view(t.shape)  # not aligned


def other_kind(rng, t):
    kind = rng.randrange(4)
    if kind == 0:
        return t.to("meta")
    if kind == 1:
        return t.to_sparse() if t.dtype != torch.bool else t
    if kind == 2:
        return torch.complex(t.float(), t.float()).conj().imag  # a negative view
    return torch.nn.Parameter(t) if t.is_floating_point() else t


TENSOR_CHANGES = [other_size, other_size, other_rank, other_strides, other_strides, other_kind]
NUMBERS = [0, -1, 1, 2, 3, 2**31, 2**62, 1.5, None, "same"]


def change(rng, call):
    """One argument, made to fit no longer; or at times it does."""
    name = rng.choice([*NAMES, *NAMES, "stride", "padding", "dilation", "groups"])
    if name in NAMES:
        t = call[name]
        if t is None:
            call[name] = torch.randn(rng.choice([0, 1, 5, 24]))
        elif t.device.type == "cpu" and t.layout == torch.strided:
            if rng.random() < 0.15:
                call[name] = t.to(rng.choice(DTYPES))
            else:
                call[name] = rng.choice(TENSOR_CHANGES)(rng, t)
    elif name == "groups":
        call[name] = rng.choice(NUMBERS)
    else:
        call[name] = rng.choice(
            [(rng.choice(NUMBERS), 1), (1, rng.choice(NUMBERS)), (1,), (1, 1, 1), [1, 2], "same", "valid", 1]
        )


def expected(call):
    """What plain operations make of copies that are laid out anew."""
    x, weight, bias, coefficients = (
        t if t is None else t.detach().clone(memory_format=torch.contiguous_format).double()
        for t in (call[name] for name in NAMES[:4])
    )
    geometry = Geometry(call["stride"], call["padding"], call["dilation"], call["groups"])
    out = strategies.groups(Operands(x, weight, bias, Mixing(coefficients), geometry))
    return out if call["shift"] is None else out + call["shift"].detach().double()[:, None, None]


def run(rng, call):
    """The call in one of the ways it can be made. Returns what became of it."""
    way = rng.choice(["inference", "training", "operator", "backward"])
    tensors = [call[name] for name in NAMES]
    geometry = [call[name] for name in ("stride", "padding", "dilation", "groups")]
    if way == "inference":
        with torch.inference_mode():
            out = dynamic_conv(*tensors[:4], *geometry, tensors[4])
    elif way == "training":
        tensors[:4] = [
            t.detach().requires_grad_() if t is not None and t.is_floating_point() else t for t in tensors[:4]
        ]
        out = dynamic_conv(*tensors[:4], *geometry, tensors[4])
        if not out.is_meta:
            out.backward(torch.ones_like(out) if rng.random() < 0.5 else torch.ones((), dtype=out.dtype).expand_as(out))
    elif way == "operator":
        out = torch.ops.dyconvert.dynamic_conv(*tensors[:4], None, *geometry, tensors[4], False)
    else:
        x, weight, _, coefficients, _ = tensors
        size = [1 + rng.randrange(12) for _ in range(4)]
        grad = torch.randn(size, dtype=torch.float32 if rng.random() < 0.5 else torch.float64)
        torch.ops.dyconvert.dynamic_conv_backward(grad, x, weight, coefficients, None, *geometry, [True] * 3 + [False])
        return "a gradient"
    if out.is_meta:
        return "meta"
    wanted = expected(call)
    assert out.shape == wanted.shape, (way, out.shape, wanted.shape)
    scale = wanted.abs().max() if wanted.numel() else 1
    assert wanted.numel() == 0 or (out.double() - wanted).abs().max() <= 2e-2 * scale, (way, described(call))
    return "computed"


def described(call):
    return {
        name: (tuple(t.shape), t.stride(), t.dtype) if isinstance(t, torch.Tensor) else t for name, t in call.items()
    }


def main(count, seed=0):
    """Returns how often what came of a call."""
    rng = random.Random(seed)
    ends = Counter()
    for _ in range(count):
        call = fitting_call(rng)
        for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
            change(rng, call)
        try:
            ends[run(rng, call)] += 1
        except ArgumentError:
            ends["refused"] += 1
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:  # torch's own
            ends[f"torch: {type(error).__name__}: {str(error).splitlines()[0][:90]}"] += 1
    return ends


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    native_library.LIBRARY = Path(sys.argv[3]) if len(sys.argv) > 3 else native_library.LIBRARY
    assert native_library.library() is not None
    for end, times in main(*map(int, sys.argv[1:3])).most_common():
        print(times, end)
