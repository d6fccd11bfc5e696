"""Samples rows of maps: the same rows of all maps of one size. Knows which of them are of held-out images."""

import torch
from torch import Tensor

# Bytes of all samples together, and the least and most rows of one layer.
_SAMPLES = 2 << 30
_ROWS = (4096, 32768)

# At most this many images, or this share of them, aren't used to solve the weights, but to measure their error.
_HELD_OUT = 100
_HELD_OUT_SHARE = 5


def held_out(images: int) -> int:
    """The number of held-out images among `images`: they are the last ones."""
    return 0 if images < 2 else min(max(images // _HELD_OUT_SHARE, 1), _HELD_OUT)


class Positions:
    """Rows of maps: a map `[N, C, *spatial]`, or `[..., C]`, has a row for each pixel, of C numbers.

    Args:
        images: number of images.
        limit: most rows of one layer.
    """

    def __init__(self, images: int, limit: int, seed: int) -> None:
        self._images = images
        self._fitted = images - held_out(images)
        self._limit = limit
        self._seed = seed
        self._known: dict[tuple[int, int], Tensor] = {}

    def of(self, rows: int, calls: int = 1) -> Tensor:
        """`[P]`: numbers of the sampled rows of a map that has `rows`, in order. With several `calls`, fewer each."""
        if (rows, calls) not in self._known:
            limit = max(self._limit // calls, 64)
            generator = torch.Generator().manual_seed(self._seed)
            chosen = torch.arange(rows)
            if rows > limit:
                chosen = torch.randint(rows, (limit,), generator=generator).unique()
            self._known[rows, calls] = chosen
        return self._known[rows, calls]

    def fitted(self, rows: int, calls: int = 1) -> int:
        """The number of sampled rows, the first ones, of images that the weights are solved on.

        A map's rows are in the order of its images.
        """
        return int((self.of(rows, calls) < rows * self._fitted / self._images).sum())

    def take(self, x: Tensor, channels_first: bool, calls: int = 1) -> Tensor:
        """The sampled rows `[P, C]` of a map `[N, C, *spatial]`, or `[..., C]`."""
        if channels_first:
            x = x.movedim(1, -1)
        leading = tuple(x.shape[:-1])
        rows = x.numel() // x.shape[-1]
        return x[torch.unravel_index(self.of(rows, calls).to(x.device), leading)]


def positions_for(images: int, channels: int, seed: int) -> Positions:
    """Positions with as many rows as the memory for samples of `channels` channels allows."""
    low, high = _ROWS
    return Positions(images, min(max(_SAMPLES // (4 * max(channels, 1)), low), high), seed)
