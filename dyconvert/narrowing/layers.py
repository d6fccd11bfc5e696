"""What a narrowed model may hold that the original did not."""

from torch import Tensor, nn


class ChannelSlice(nn.Module):
    """A part of the channels that `module` returns: `[N, C, ...]` to `[N, stop - start, ...]`.

    A shortcut that pads channels has no parameters to narrow, and its padding is as wide as it was; this takes
    what is left of it.

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
