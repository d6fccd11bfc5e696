"""The module that a narrowed model may have and the original doesn't."""

from torch import Tensor, nn


class ChannelSlice(nn.Module):
    """A slice of the channels that `module` returns: `[N, C, ...]` to `[N, stop - start, ...]`.

    A shortcut that pads channels has no parameters to narrow, and its padding stays as wide as it was; this module
    takes the kept channels of its output.

    Args:
        module: a module without parameters, such as the shortcut of a CIFAR ResNet.
        start, stop: the channels that are kept.
    """

    def __init__(self, module: nn.Module, start: int, stop: int) -> None:
        super().__init__()
        self.module = module
        self.start = start
        self.stop = stop

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)[:, self.start : self.stop]

    def extra_repr(self) -> str:
        return f"channels {self.start}:{self.stop}"
