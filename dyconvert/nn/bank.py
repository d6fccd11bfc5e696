"""A dynamic conv's bank: its experts' weights and biases, compressed or not, and mixing them."""

import torch
from torch import Tensor, nn

from dyconvert.nn.compress import compressed, per_output, unpacked
from dyconvert.nn.compressed import Compressed
from dyconvert.nn.mixture import Mixing, Mixture

# A leaf to symbolic tracing, as convs are.
torch.fx.wrap("unpacked")


class Bank(nn.Module):
    """The part of a dynamic conv that holds its experts; :class:`~dyconvert.nn.DynamicConv` documents the parameters.

    A subclass says whether it is transposed: a transposed conv's experts have their input channels first.
    """

    spatial_dims: int
    transposed = False
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    groups: int
    g: int
    weight: nn.Parameter
    bias: nn.Parameter | None
    shift: nn.Parameter | None
    mean: nn.Parameter | None
    scale: nn.Parameter | None

    def experts(self) -> Tensor:
        """The bank, expert by expert: `[g, C_out, C_in / groups, *kernel]`, transposed C_in first.

        A view; for a compressed conv, the unpacked weights.
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
