"""DynamicConv1d/2d/3d and DynamicConvTranspose1d/2d/3d: convs with g weight sets, mixed per image."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyconvert.errors import ModelError
from dyconvert.methods import Method, get_method
from dyconvert.nn.bank import Bank
from dyconvert.nn.compressed import Compressed
from dyconvert.nn.dispatch import compressed_conv, dynamic_conv
from dyconvert.nn.handing import mixture_for
from dyconvert.nn.mixture import Mixture, sizes_for
from dyconvert.nn.padding import TF_SAME, amounts_of_padding, pad_tf_same
from dyconvert.nn.predictor import CoefficientPredictor

# Leaves to symbolic tracing: they depend on shapes, which a Proxy doesn't know.
torch.fx.wrap("dynamic_conv")
torch.fx.wrap("compressed_conv")
torch.fx.wrap("pad_tf_same")


class DynamicConv(Bank):
    r"""A conv whose kernel is mixed per image from g experts, :math:`\tilde w = \sum_i \eta^i w^i`.

    By hand it is made as the static conv is, `DynamicConv2d(16, 32, 3, g=4)`, and predicts its coefficients from its
    own input. In a converted model the coefficients may come from the block that the conv stands in, by the block's
    hooks (:mod:`dyconvert.nn.handing`).

    The parameters keep the names and the number of dimensions that they have in the static conv, so that
    memory formats, initialisers and weight-decay rules go on working:

    - `weight`: the bank `[g * C_out, C_in / groups, *kernel]`, expert by expert; :meth:`experts` has one per index;
    - `bias`: `[g * C_out]`, or None;
    - `shift`: `[C_out]`, or None: added after mixing, the same for every image. Only
      :func:`~dyconvert.surgery.fuse.fuse` sets it, for a batch norm's shift that is not to be mixed;
    - `mean` and `scale`: None, but for a compressed conv (:func:`~dyconvert.compress`), whose `weight` are the experts'
      differences from their mean.

    Attributes other than these are the static conv's (`stride`, `padding_mode`, ...), beside `g`; `sizes`, the
    sizes of its predictor's outputs (:class:`~dyconvert.nn.mixture.Sizes`); and `initial_coefficient`, where all
    coefficients start.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            of the static conv. `padding` may also be :data:`~dyconvert.nn.padding.TF_SAME`.
        g: number of experts. None: the method's own.
        method: a name, or a :class:`~dyconvert.methods.Method`, which says how coefficients are predicted.

    Shape:
        - Input: `[N, C_in, *spatial]`; coefficients, where given by hand, `[N, g, 1]`, `[N, g, C_out]` or a
          :class:`~dyconvert.nn.mixture.Mixture`
        - Output: `[N, C_out, *spatial]`

    Examples:
        >>> import torch
        >>> from dyconvert import DynamicConv2d
        >>> conv = DynamicConv2d(16, 32, 3, padding=1, g=4)
        >>> conv(torch.randn(2, 16, 8, 8)).shape
        torch.Size([2, 32, 8, 8])
    """

    coefficient_predictor: CoefficientPredictor | None
    block_predictor: CoefficientPredictor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        g: int | None = None,
        method: str | Method = "dynet",
    ) -> None:
        super().__init__()
        if in_channels % groups or out_channels % groups:
            raise ValueError(f"{in_channels} and {out_channels} channels can't be divided into {groups} groups.")
        method = get_method(method, g=g)
        self._describe(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            padding_mode,
            method,
        )
        first, second = (in_channels, out_channels) if self.transposed else (out_channels, in_channels)
        options = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(method.g * first, second // groups, *self.kernel_size, **options))
        own = nn.Parameter(torch.empty(method.g * out_channels, **options)) if bias else None
        self.register_parameter("bias", own)
        self.coefficient_predictor = CoefficientPredictor(in_channels, [self.sizes], method, dtype=dtype).to(device)
        self.reset_parameters()

    def _describe(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int],
        padding: int | Sequence[int] | str,
        dilation: int | Sequence[int],
        groups: int,
        padding_mode: str,
        method: Method,
    ) -> None:
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = self._each(kernel_size)
        self.stride = self._each(stride)
        self.padding = padding if isinstance(padding, str) else self._each(padding)
        self.dilation = self._each(dilation)
        self.groups = groups
        self.padding_mode = padding_mode
        self.g = method.g
        self.sizes = sizes_for(method, in_channels, out_channels, self.kernel_size, groups)
        self.initial_coefficient = method.initial_coefficient
        self._explicit_padding = (
            None if padding_mode == "zeros" else amounts_of_padding(self.kernel_size, self.padding, self.dilation)
        )
        # The mixture that a block hands over while it is compiled; see nn/handing.py.
        self._handed: Mixture | None = None
        self.register_parameter("shift", None)
        self.register_parameter("mean", None)
        self.register_parameter("scale", None)
        # The conv's own predictor reads its input. The block's stands here if this conv is the first that it serves.
        self.coefficient_predictor = None
        self.block_predictor = None

    @classmethod
    def from_conv(
        cls,
        conv: nn.Module,
        method: Method,
        *,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        padding: Sequence[int] | str,
        coefficient_predictor: CoefficientPredictor | None = None,
    ) -> "DynamicConv":
        """The dynamic conv that stands in the place of a static one.

        Args:
            conv: a conv of torch's, of as many dimensions, transposed or not as this class.
            weight, bias: the banks, as the class has them.
            padding: the conv's padding, which a subclass of torch's conv may name otherwise.
            coefficient_predictor: None: the coefficients will be handed by the conv's block.
        """
        dynamic = cls.__new__(cls)
        nn.Module.__init__(dynamic)
        dynamic._describe(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            padding,
            conv.dilation,
            conv.groups,
            conv.padding_mode,
            method,
        )
        dynamic.weight = weight
        dynamic.register_parameter("bias", bias)
        dynamic.coefficient_predictor = coefficient_predictor
        return dynamic

    def reset_parameters(self) -> None:
        """Draw every expert as torch draws a static conv's weight and bias, so that half of them, say, mix to one."""
        scale = 1 / (self.g * self.initial_coefficient)
        for expert in self.experts():
            nn.init.kaiming_uniform_(expert, a=math.sqrt(5))
        with torch.no_grad():
            # g independent draws, each weighted by c, have g * c^2 of one draw's variance.
            self.weight.mul_(scale * self.g**0.5)
            if self.bias is not None:
                bound = (self.in_channels // self.groups * math.prod(self.kernel_size)) ** -0.5
                self.bias.uniform_(-bound, bound).mul_(scale * self.g**0.5)

    def forward(self, input: Tensor, coefficients: Tensor | Mixture | None = None) -> Tensor:
        if coefficients is None:
            coefficients = mixture_for(self, input)
        x, padding = self.padded(input)
        geometry = (self.stride, padding, self.dilation, self.groups)
        if self.mean is None:
            return dynamic_conv(x, self.weight, self.bias, coefficients, *geometry, self.shift)
        self._refuse_training()
        bank = Compressed(self.mean, self.weight, self.scale)
        return compressed_conv(x, bank, self.bias, coefficients, *geometry, self.shift)

    def _refuse_training(self) -> None:
        if self.training and torch.is_grad_enabled():
            refuse_compressed(self)

    def padded(self, x: Tensor) -> tuple[Tensor, Sequence[int] | str]:
        """The input with what :func:`dynamic_conv` can't pad by put onto it, and the padding that is left to it."""
        if self._explicit_padding is not None:
            x = F.pad(x, self._explicit_padding, mode=self.padding_mode)
        elif self.padding == TF_SAME:
            x = pad_tf_same(x, self.kernel_size, self.stride, self.dilation)
        else:
            return x, self.padding
        return x, (0,) * self.spatial_dims

    def _each(self, value: int | Sequence[int]) -> tuple[int, ...]:
        return (value,) * self.spatial_dims if isinstance(value, int) else tuple(value)

    def extra_repr(self) -> str:
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, g={self.g}, {self.sizes.text()}"
        )
        if self.padding not in ("valid", (0,) * self.spatial_dims):
            text += f", padding={self.padding}"
        if self.dilation != (1,) * self.spatial_dims:
            text += f", dilation={self.dilation}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        if self.bias is None:
            text += ", bias=False"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode}"
        if self.shift is not None:
            text += ", shift=True"
        if self.mean is not None:
            text += f", compressed={str(self.weight.dtype).removeprefix('torch.')}"
        return text


def refuse_compressed(model: nn.Module) -> None:
    """Refuse to train or change a model, or a conv, that is compressed.

    Raises:
        ModelError: it is.
    """
    if any(isinstance(module, DynamicConv) and module.mean is not None for module in model.modules()):
        raise ModelError(
            f"This {type(model).__name__} is compressed, for inference, and can't be trained. Train it before it is "
            "compressed, and compress it then; to use it as it is, call model.eval()."
        )


class DynamicConv1d(DynamicConv):
    __doc__ = DynamicConv.__doc__
    spatial_dims = 1


class DynamicConv2d(DynamicConv):
    __doc__ = DynamicConv.__doc__
    spatial_dims = 2


class DynamicConv3d(DynamicConv):
    __doc__ = DynamicConv.__doc__
    spatial_dims = 3
