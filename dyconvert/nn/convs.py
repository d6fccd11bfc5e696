"""DynamicConv1d/2d/3d and DynamicConvTranspose1d/2d/3d: convs with g weight sets, mixed per image."""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyconvert.errors import ModelError
from dyconvert.methods import Method, get_method
from dyconvert.nn.compress import compressed, per_output, unpacked
from dyconvert.nn.compressed import Compressed
from dyconvert.nn.dispatch import compressed_conv, dynamic_conv
from dyconvert.nn.fitting import check_transposed
from dyconvert.nn.handing import mixture_for
from dyconvert.nn.mixing import kernels_of, mix
from dyconvert.nn.mixture import Mixing, Mixture, sizes_for
from dyconvert.nn.padding import TF_SAME, amounts_of_padding, pad_tf_same
from dyconvert.nn.predictor import CoefficientPredictor
from dyconvert.torch_internals.modules import output_padding as output_padding_for

# Leaves to symbolic tracing: they depend on shapes, which a Proxy doesn't know.
torch.fx.wrap("dynamic_conv")
torch.fx.wrap("compressed_conv")
torch.fx.wrap("unpacked")
torch.fx.wrap("dynamic_conv_transpose")
torch.fx.wrap("pad_tf_same")

_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class DynamicConv(nn.Module):
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

    Attributes other than these are the static conv's (`stride`, `padding_mode`, ...), beside `g`; `sizes`, what its
    predictor gives it (:class:`~dyconvert.nn.mixture.Sizes`); and `initial_coefficient`, what all of them start at.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            of the static conv. `padding` may also be :data:`~dyconvert.nn.padding.TF_SAME`.
        g: number of experts. None: the method's own.
        method: a name, or a :class:`~dyconvert.methods.Method`: what the coefficients are, and their predictor.

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

    spatial_dims: int
    transposed = False
    bias: nn.Parameter | None
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
        # What a block being compiled hands over; see nn/handing.py.
        self._handed: Mixture | None = None
        self.register_parameter("shift", None)
        self.register_parameter("mean", None)
        self.register_parameter("scale", None)
        # Of the conv itself, reading its input; of the block, where this conv is the first that it serves.
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
            padding: what the conv pads by, which a subclass of torch's may say otherwise.
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

    def experts(self) -> Tensor:
        """The bank, expert by expert: `[g, C_out, C_in / groups, *kernel]`, transposed C_in first.

        A view, or of a compressed conv what is unpacked.
        """
        if self.mean is None:
            return self.weight.unflatten(0, (self.g, -1))
        bank = Compressed(self.mean, self.weight, self.scale)
        return unpacked(bank, self.g, self.groups, transposed=self.transposed)

    def compress(self, dtype: torch.dtype, *, fill: bool = True) -> None:
        """Keep the experts as their mean and their differences in `dtype`, int8 or bfloat16, for inference.

        Args:
            fill: False: with no values, which will be loaded.
        """
        if fill:
            bank = compressed(self.experts(), dtype, self.groups, transposed=self.transposed)
        else:
            mean = torch.empty_like(self.experts()[0])
            scale = mean.new_empty(self.g, self.out_channels) if dtype is torch.int8 else None
            bank = Compressed(mean, torch.empty_like(self.weight, dtype=dtype, requires_grad=False), scale)
        self._set_bank(bank)

    def _set_bank(self, bank: Compressed) -> None:
        names = ("mean", "weight", "scale")
        for name, tensor in zip(names, bank, strict=True):
            setattr(self, name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))

    def _refuse_training(self) -> None:
        if self.training and torch.is_grad_enabled():
            refuse_compressed(self)

    def scale_outputs(self, scale: Tensor) -> None:
        """Multiply each output channel of every expert, and of its bias, by `scale`, `[C_out]`, in float64."""
        factors = self._per_output(scale.double().expand(self.g, -1))
        with torch.no_grad():
            if self.mean is not None:
                self._scale_bank(scale.double(), factors)
            else:
                scaled = (self.experts().double() * factors).flatten(0, 1)
                self.weight = nn.Parameter(scaled.to(self.weight.dtype), self.weight.requires_grad)
            if self.bias is not None:
                scaled = self.bias.double() * scale.double().repeat(self.g)
                self.bias = nn.Parameter(scaled.to(self.bias.dtype), self.bias.requires_grad)

    def _scale_bank(self, scale: Tensor, factors: Tensor) -> None:
        mean = (self.mean.double() * factors[0]).to(self.mean.dtype)
        if self.scale is not None:
            self._set_bank(Compressed(mean, self.weight, (self.scale.double() * scale).to(self.scale.dtype)))
            return
        differences = self.weight.unflatten(0, (self.g, -1)).double() * factors
        self._set_bank(Compressed(mean, differences.flatten(0, 1).to(self.weight.dtype), None))

    def fold(self, mixture: Mixture) -> Mixing:
        """A mixture as engines compute with it; a transposed conv's kernels have their output channels first there."""
        shape = (self.g * self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        return Mixing.of(mixture, shape, self.groups, self.bias is not None)

    def mixed(self, mixture: Mixture) -> tuple[Tensor, Tensor | None]:
        """The static weight and bias (with the shift) that a fixed mixture makes, in float64.

        Args:
            mixture: of one image.

        Returns:
            One expert's shape, in the bank's memory format; `[C_out]` or None.
        """
        mixture = mixture.map(lambda axis: axis.to(self.weight.device, torch.float64))
        eta = mixture.coefficients()[0]  # [g, 1] or [g, C_out]
        total: Tensor | None = None
        # One expert at a time: in float64 all of them would be many times the bank.
        for expert, factor in zip(self.experts().detach(), self._per_output(eta), strict=True):
            part = expert.double() * factor
            total = part if total is None else total.add_(part)
        factors = mixture.factors(self.groups, self.in_channels // self.groups, self.kernel_size)
        if factors is not None:
            total *= self._per_element(factors[0])
        bias = None
        if self.bias is not None:
            bias = (self.bias.detach().double().unflatten(0, (self.g, -1)) * eta).sum(0)
        if self.shift is not None:
            bias = self.shift.detach().double() + (0 if bias is None else bias)
        return total, bias

    def _per_output(self, factors: Tensor) -> Tensor:
        """`[g, 1 | C_out]` as what multiplies :meth:`experts`."""
        channels = self.in_channels if self.transposed else None
        return per_output(factors, self.spatial_dims, self.groups, channels)

    def _per_element(self, factors: Tensor) -> Tensor:
        """Factors `[groups or 1, C_in / groups, *kernel]` as what multiplies one expert."""
        return factors if len(factors) == 1 else factors.repeat_interleave(self.out_channels // self.groups, 0)

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
    """Refuse a model, or a conv, that is to be trained or changed, and is compressed.

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


def dynamic_conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coefficients: Tensor | Mixture,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
    dilation: Sequence[int],
) -> Tensor:
    """Convolve every image, transposed, with the kernel that its own coefficients mix.

    Args:
        x: `[N, C_in, *spatial]`
        weight: the bank, `[g * C_in, C_out / groups, *kernel]`, expert by expert.
        bias: `[g * C_out]` or None.
        coefficients: `[N, g, 1]`, `[N, g, C_out]`, or a whole :class:`~dyconvert.nn.mixture.Mixture`.
        stride, padding, output_padding, groups, dilation: as in `torch.nn.functional.conv_transpose2d`.

    Returns:
        `[N, C_out, *spatial]`

    Raises:
        ArgumentError: which argument doesn't fit, and what would.
    """
    mixing = _folded_transposed(coefficients, x, weight, groups)
    check_transposed(x, weight, bias, mixing.coefficients, groups)
    batch, g = mixing.images, mixing.g
    if batch == 0:
        return _transpose_of_nothing(x, weight, bias, g, stride, padding, output_padding, groups, dilation)
    # The output channel stands second in each group; mixing wants it first.
    bank = weight.unflatten(0, (g, groups, -1)).transpose(2, 3)  # [g, G, C_out / G, C_in / G, *kernel]
    kernel = kernels_of(bank.flatten(1, 2), mixing)  # [N, C_out, C_in / G, *kernel]
    kernel = kernel.unflatten(1, (groups, -1)).transpose(2, 3).flatten(0, 2)  # [N * C_in, C_out / G, *kernel]
    mixed_bias = None if bias is None else mix(bias.unflatten(0, (g, -1)), mixing.coefficients).flatten()
    out = _CONV_TRANSPOSE[x.dim() - 2](
        x.reshape(1, -1, *x.shape[2:]),
        kernel,
        mixed_bias,
        stride,
        padding,
        output_padding,
        groups * batch,
        dilation,
    )
    return out.unflatten(1, (batch, -1)).squeeze(0)


def _folded_transposed(mixture: Tensor | Mixture, x: Tensor, weight: Tensor, groups: int) -> Mixing:
    """A mixture for a transposed conv's bank, whose kernels are taken with their output channels first."""
    if isinstance(mixture, Tensor):
        return Mixing(mixture)
    shape = (mixture.experts.shape[1] * weight.shape[1] * groups, x.shape[1] // groups, *weight.shape[2:])
    return Mixing.of(mixture, shape, groups)


def _transpose_of_nothing(x: Tensor, weight: Tensor, bias: Tensor | None, g: int, *geometry: Any) -> Tensor:
    """The output for an empty batch: any kernel gives it."""
    return _CONV_TRANSPOSE[x.dim() - 2](x, weight.chunk(g)[0], None if bias is None else bias.chunk(g)[0], *geometry)


class DynamicConvTranspose(DynamicConv):
    r"""A transposed conv whose kernel is mixed per image from g experts.

    As :class:`DynamicConv`, but for `weight`: the bank `[g * C_in, C_out / groups, *kernel]`, and
    `output_padding` and `output_size`, which are those of `nn.ConvTranspose2d`.
    """

    transposed = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | Sequence[int] = 1,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        g: int | None = None,
        method: str | Method = "dynet",
    ) -> None:
        if padding_mode != "zeros":
            raise ValueError("A transposed conv pads with zeros only: padding_mode='zeros'.")
        geometry = (stride, padding, dilation, groups, bias, padding_mode, device, dtype)
        super().__init__(in_channels, out_channels, kernel_size, *geometry, g=g, method=method)
        self.output_padding = self._each(output_padding)

    @classmethod
    def from_conv(cls, conv: nn.Module, method: Method, **parts: Any) -> "DynamicConvTranspose":
        """As :meth:`DynamicConv.from_conv`."""
        dynamic = cast(DynamicConvTranspose, super().from_conv(conv, method, **parts))
        dynamic.output_padding = tuple(conv.output_padding)
        return dynamic

    def forward(  # type: ignore[override]  # torch's transposed convs take the size second
        self, input: Tensor, output_size: list[int] | None = None, coefficients: Tensor | Mixture | None = None
    ) -> Tensor:
        own: Any = self
        output_padding = output_padding_for(
            own, input, output_size, own.stride, own.padding, own.kernel_size, self.spatial_dims, own.dilation
        )
        if self.mean is not None:
            self._refuse_training()
        out = dynamic_conv_transpose(
            input,
            self.weight if self.mean is None else self.experts().flatten(0, 1),
            self.bias,
            mixture_for(self, input) if coefficients is None else coefficients,
            self.stride,
            own.padding,
            output_padding,
            self.groups,
            self.dilation,
        )
        return out if self.shift is None else out + self.shift.view(-1, *[1] * self.spatial_dims)

    def _per_element(self, factors: Tensor) -> Tensor:
        return factors.expand(self.groups, *factors.shape[1:]).flatten(0, 1).unsqueeze(1)


class DynamicConvTranspose1d(DynamicConvTranspose):
    __doc__ = DynamicConvTranspose.__doc__
    spatial_dims = 1


class DynamicConvTranspose2d(DynamicConvTranspose):
    __doc__ = DynamicConvTranspose.__doc__
    spatial_dims = 2


class DynamicConvTranspose3d(DynamicConvTranspose):
    __doc__ = DynamicConvTranspose.__doc__
    spatial_dims = 3


# The class of a static conv, by class; both ways.
DYNAMIC_OF: dict[type[nn.Module], type[DynamicConv]] = {
    nn.Conv1d: DynamicConv1d,
    nn.Conv2d: DynamicConv2d,
    nn.Conv3d: DynamicConv3d,
    nn.ConvTranspose1d: DynamicConvTranspose1d,
    nn.ConvTranspose2d: DynamicConvTranspose2d,
    nn.ConvTranspose3d: DynamicConvTranspose3d,
}
STATIC_OF: dict[type[DynamicConv], type[nn.Module]] = {dynamic: static for static, dynamic in DYNAMIC_OF.items()}
