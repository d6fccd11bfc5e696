"""What the original computes on calibration images, at sampled positions."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from dyconvert.errors import ModelError
from dyconvert.narrowing.choose import by_unit, normalised
from dyconvert.narrowing.flow import Aim, Listener
from dyconvert.narrowing.graph import Graph, Group

# Bytes of all samples together, and the positions of one layer that this may come to.
_SAMPLES = 2 << 30
_POSITIONS = (4096, 32768)
_BATCH = 32
# Bytes of the narrowed model's maps, for all images at once: about four of its largest are held at a time.
_MAPS = 4 << 30
_HELD = 4


def collect_images(data: Iterable[Any], count: int, like: Tensor) -> Tensor:
    """The first `count` images of a loader, `[N, C, *spatial]`, on the device and in the dtype of `like`.

    Args:
        data: batches: a tensor, or a tuple or list whose first item is one, or a dict with one.

    Raises:
        ModelError: there are none, or the batches hold no tensors.
    """
    found, seen = [], 0
    for batch in [data] if isinstance(data, Tensor) else data:
        tensors = [leaf for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor)]
        if not tensors or tensors[0].dim() < 2:
            raise ModelError(
                f"The calibration data gave a {type(batch).__name__} without a batch of images. Give batches "
                "[N, C, H, W], or (images, labels), as a DataLoader does."
            )
        found.append(tensors[0][: count - seen].to(like.device, like.dtype))
        seen += len(found[-1])
        if seen >= count:
            break
    if not seen:
        raise ModelError("The calibration data holds no images. Give a DataLoader or a tensor of images as data=...")
    return torch.cat(found)


@torch.no_grad()
def images_that_fit(model: nn.Module, image: Tensor) -> int:
    """How many images may go through the model at once, by the largest map that one image makes."""
    largest = 0

    def measure(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal largest
        if isinstance(output, Tensor):
            largest = max(largest, output.numel() * output.element_size())

    handles = [module.register_forward_hook(measure) for module in model.modules()]
    model(image)
    for handle in handles:
        handle.remove()
    return max(_MAPS // (_HELD * max(largest, 1)), 1)


class Positions:
    """Where maps are sampled: the same places of all maps of one size.

    Args:
        images: how many there are.
        limit: positions of one layer.
    """

    def __init__(self, images: int, limit: int, seed: int) -> None:
        self.images = images
        self._limit = limit
        self._seed = seed
        self._known: dict[tuple[int, ...], Tensor] = {}

    def of(self, spatial: tuple[int, ...]) -> Tensor:
        """`[P]`: image * pixels + pixel, in order."""
        if spatial not in self._known:
            pixels = int(torch.tensor(spatial).prod()) if spatial else 1
            total = self.images * pixels
            generator = torch.Generator().manual_seed(self._seed)
            if total <= self._limit:
                self._known[spatial] = torch.arange(total)
            else:
                self._known[spatial] = torch.randint(total, (self._limit,), generator=generator).unique()
        return self._known[spatial]

    def take(self, x: Tensor, channels_first: bool, first: int = 0) -> Tensor:
        """Sample a map `[N, C, *spatial]` (`[N, *spatial, C]`) of the images from number `first` on: `[P, C]`."""
        if channels_first:
            x = x.movedim(1, -1)
        spatial = tuple(x.shape[1:-1])
        pixels = int(torch.tensor(spatial).prod()) if spatial else 1
        chosen = self.of(spatial)
        chosen = chosen[(chosen >= first * pixels) & (chosen < (first + len(x)) * pixels)] - first * pixels
        index = torch.unravel_index(chosen.to(x.device), (len(x), *spatial))
        return x[index]


def positions_for(images: int, channels: int, seed: int) -> Positions:
    """As many positions as the samples of `channels` channels may take memory for."""
    low, high = _POSITIONS
    return Positions(images, min(max(_SAMPLES // (4 * max(channels, 1)), low), high), seed)


@torch.no_grad()
def sample(
    model: nn.Module,
    images: Tensor,
    aims: dict[str, Aim],
    positions: Positions,
    progress: Callable[[int, int], None],
) -> dict[str, Tensor]:
    """Each layer's output at its aim, `[P, C]`, in eval mode."""
    found: dict[str, list[Tensor]] = {name: [] for name in aims}
    first = 0

    def keep(name: str, aim: Aim) -> Callable[[Tensor], None]:
        # A copy at once: what is in place comes next.
        return lambda t: found[name].append(positions.take(t, aim.channels_first, first).clone())

    wanted: dict[int, list[Callable[[Tensor], None]]] = {}
    for name, aim in aims.items():
        wanted.setdefault(aim.operator, []).append(keep(name, aim))
    for first in range(0, len(images), _BATCH):
        progress(first, len(images))
        batch = images[first : first + _BATCH]
        with Listener(wanted):
            model(batch)
    return {name: torch.cat(parts) for name, parts in found.items()}


def map_similarity(samples: dict[str, Tensor], graph: Graph, group: Group) -> Tensor | None:
    """The covariance of a group's feature maps, the mean over its layers; None where none was sampled.

    Layers that see 1x1 maps, as squeeze-excite's do, count where there are no others.
    """
    parts = {}
    for member in group.makers:
        if member.name not in samples or len(member.positions) != group.size:
            continue
        ordered = torch.empty(group.size, dtype=torch.long)
        ordered[member.positions] = member.channels
        rows = samples[member.name][:, ordered].float()
        rows = rows - rows.mean(0)
        parts[member.name] = normalised(rows.T @ rows / len(rows))
    large = [part for name, part in parts.items() if graph.layers[name].positions > 1]
    chosen = large or list(parts.values())
    return by_unit(torch.stack(chosen).mean(0), group) if chosen else None
