"""A predictor's linear layers: at a few images they are bound by reading their weights."""

import torch
from torch import Tensor, nn

from dyconvert.nn import compile_op, native
from dyconvert.nn.compress import LARGEST, read_as_they_are, scale_of
from dyconvert.nn.compressed import plain_linear
from dyconvert.nn.trials import is_tracing

# Up to this many images, and with at least this many weights, the compiled kernels' linear is faster than a matmul,
# which reads the weights at a third to four fifths of its rate. With fewer weights, a call takes longer than it saves.
_FEW = 8
_WORTH_A_CALL = 2**16


def compressed_linear(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor) -> Tensor:
    """The output of :class:`CompressedLinear` for `x`, `[N, in_features]`."""
    if read_as_they_are(x, weight, scale, bias):
        if torch.compiler.is_compiling():
            return compile_op.compressed_linear(x, weight, scale, bias)
        if (out := native.linear(x, weight, scale, bias)) is not None:
            return out
    return plain_linear(x, weight, scale, bias)


torch.fx.wrap("compressed_linear")


def predictor_linear(in_features: int, out_features: int, dtype: torch.dtype | None = None) -> nn.Linear:
    """A linear without values, on the meta device: a plain one, or where weights are many one that reads them fast."""
    kind = LargeLinear if in_features * out_features >= _WORTH_A_CALL else nn.Linear
    return kind(in_features, out_features, device="meta", dtype=dtype)


class LargeLinear(nn.Linear):
    """A linear that the compiled kernels compute for a few images without gradients; else it is a plain one."""

    def forward(self, input: Tensor) -> Tensor:
        out = native.linear(input, self.weight, None, self.bias) if self._is_for_the_kernels(input) else None
        return super().forward(input) if out is None else out

    def _is_for_the_kernels(self, x: Tensor) -> bool:
        return (
            type(x) is Tensor  # not a tracer's stand-in
            and not is_tracing()
            and x.dim() == 2
            and x.shape[0] <= _FEW
            and self.bias is not None
            and not torch.compiler.is_compiling()
            and read_as_they_are(x, self.weight, self.bias)
        )


class CompressedLinear(nn.Module):
    r"""A predictor's linear layer with weights of few bits, :math:`y = s \odot (Q x) + b`.

    Attributes:
        weight: `[out_features, in_features]`, int8 or bfloat16.
        scale: `[out_features]`, or None for bfloat16.
        bias: `[out_features]`.
    """

    def __init__(self, weight: Tensor, scale: Tensor | None, bias: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("scale", None if scale is None else nn.Parameter(scale, requires_grad=False))
        self.bias = nn.Parameter(bias, requires_grad=False)

    @classmethod
    def of(cls, linear: nn.Linear, dtype: torch.dtype) -> "CompressedLinear":
        """The layer that is nearest to `linear`."""
        weight = linear.weight.detach()
        scale = None
        if dtype is torch.int8:
            scale = scale_of(weight).to(weight.dtype)
            weight = (weight / scale.unsqueeze(1)).round_().clamp_(-LARGEST, LARGEST)
        # The kernels read rows.
        return cls(weight.to(dtype).contiguous(), scale, linear.bias.detach().clone())

    @classmethod
    def empty_like(cls, linear: nn.Linear, dtype: torch.dtype) -> "CompressedLinear":
        """One without values."""
        bias = linear.bias.detach()
        weight = torch.empty(linear.weight.shape, dtype=dtype, device=bias.device)
        return cls(weight, torch.empty_like(bias) if dtype is torch.int8 else None, torch.empty_like(bias))

    def forward(self, input: Tensor) -> Tensor:
        return compressed_linear(input, self.weight, self.scale, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, dtype={self.weight.dtype}"
