"""What the original computes on calibration images, at sampled positions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dyconvert.narrowing.choose import by_unit, normalised
from dyconvert.narrowing.flow import Aim, find_aims
from dyconvert.narrowing.graph import Graph, Group
from dyconvert.narrowing.images import Images
from dyconvert.narrowing.places import Place, watched
from dyconvert.narrowing.positions import Positions

# Bytes of the model's maps, for all images at once: about four of its largest are held at a time.
_MAPS = 4 << 30
_HELD = 4
# This many images show which operators a forward runs. If it runs others for all images, that is noticed afterwards.
_FIRST_LOOK = 4


@dataclass
class Samples:
    """What a model's layers return at their aims.

    Attributes:
        aims: by layer, for each of its calls.
        rows: by layer, `[P, C]` for each of its calls.
        unsteady: layers that can't be recognised: their calls were others in each of several runs.
    """

    aims: dict[str, tuple[Aim, ...]]
    rows: dict[str, list[Tensor]]
    unsteady: set[str]


@torch.no_grad()
def images_that_fit(model: nn.Module, images: Images) -> int:
    """How many images may go through the model at once, by the largest map that one image makes."""
    largest = 0

    def measure(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal largest
        if isinstance(output, Tensor):
            largest = max(largest, output.numel() * output.element_size())

    handles = [module.register_forward_hook(measure) for module in model.modules()]
    model(*images.part(0, 1))
    for handle in handles:
        handle.remove()
    return max(_MAPS // (_HELD * max(largest, 1)), 1)


def first_look(model: nn.Module, images: Images) -> dict[str, tuple[Aim, ...]]:
    """The aims of the model's layers, as a few images show them."""
    return find_aims(model, watched(model, images.part(0, _FIRST_LOOK)))


def sample(model: nn.Module, images: Images, positions: Positions) -> Samples:
    """Run the original on all images at once, as the narrowed model will be, and keep rows of each layer's output.

    Args:
        model: in eval mode.
    """
    aims = first_look(model, images)
    for _ in range(2):
        rows: dict[str, list[Tensor]] = {name: [] for name in aims}
        readers: dict[Place, list[Callable[[Tensor], None]]] = {}
        for name, calls in aims.items():
            for aim in calls:
                readers.setdefault(aim.place, []).append(_keeper(rows[name], aim, positions, len(calls)))
        watch = find_aims(model, watched(model, images.part(0, len(images)), readers))
        unsteady = {name for name in aims.keys() | watch.keys() if aims.get(name) != watch.get(name)}
        if not unsteady:
            break
        aims = watch
    else:
        rows = {name: layer_rows for name, layer_rows in rows.items() if name not in unsteady}
    return Samples({name: watch[name] for name in rows}, rows, unsteady)


def _keeper(rows: list[Tensor], aim: Aim, positions: Positions, calls: int) -> Callable[[Tensor], None]:
    # Copied at once, because an operator in place may follow.
    return lambda t: rows.append(positions.take(t, aim.channels_first, calls).clone())


def map_similarity(samples: Samples, graph: Graph, group: Group) -> Tensor | None:
    """The covariance of a group's feature maps, the mean over its layers; None where none was sampled.

    Layers that see 1x1 maps, as squeeze-excite's do, count where there are no others.
    """
    parts = {}
    for member in group.makers:
        order = member.order(group.size)
        if member.name not in samples.rows or order is None:
            continue
        rows = torch.cat(samples.rows[member.name])[:, order].float()
        rows = rows - rows.mean(0)
        covariance = rows.T @ rows / len(rows)
        if covariance.isfinite().all():
            parts[member.name] = normalised(covariance)
    large = [part for name, part in parts.items() if graph.layers[name].positions > 1]
    chosen = large or list(parts.values())
    return by_unit(torch.stack(chosen).mean(0), group) if chosen else None
