"""torchvision's models, and how one is built again exactly as its weight set made it."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torchvision
from torch import Tensor, nn
from torchvision.models import WeightsEnum

from dyconvert.models.building import call, unknown_weights
from dyconvert.models.listing import unknown_model
from dyconvert.models.source import Source
from dyconvert.models.weights import load_state_dict_into, read_state_dict


def torchvision_model(
    name: str, weights: str | Path, arguments: dict[str, Any], load: bool
) -> tuple[nn.Module, Source]:
    """Make a model of torchvision; give it `weights`, a name or a Path, unless `load` is False."""
    specifier = f"torchvision:{name}"
    if name not in torchvision.models.list_models():
        raise unknown_model(name)
    builder = torchvision.models.get_model_builder(name)
    parameters = inspect.signature(builder).parameters
    sets = torchvision.models.get_model_weights(name)
    if "quantize" in parameters and not arguments.get("quantize"):
        sets = type(sets.DEFAULT.meta["unquantized"])
    chosen = _weight_set(specifier, sets, weights)
    settings = dict(arguments)
    if "weights_backbone" in parameters:
        settings.setdefault("weights_backbone", None)  # or they are downloaded even where weights=None
    if name.endswith(("googlenet", "inception_v3")):
        # It takes seconds, wasted where weights follow; unset, it makes torchvision warn.
        settings.setdefault("init_weights", load and weights == "none")

    if chosen is None:
        model = call(specifier, builder, settings, weights=None)
        if load and isinstance(weights, Path):
            load_state_dict_into(model, read_state_dict(weights), weights)
    elif not load:
        with _empty_loads_ignored():
            model = call(specifier, builder, settings, weights=_StandIn(chosen, _Empty()))
    elif isinstance(weights, Path):
        model = call(specifier, builder, settings, weights=_StandIn(chosen, read_state_dict(weights)))
    else:
        model = call(specifier, builder, settings, chosen.url, weights=chosen)
    input_size = _input_size(builder, chosen or getattr(sets, "DEFAULT", None))
    recorded = str(weights) if isinstance(weights, Path) else chosen and chosen.name
    return model, Source(specifier, arguments, recorded, input_size)


def _weight_set(specifier: str, sets: type[WeightsEnum], weights: str | Path) -> WeightsEnum | None:
    if isinstance(weights, Path):
        return next((each for each in sets if Path(each.url).name == weights.name), None)
    if weights == "none":
        return None
    chosen = sets.__members__.get("DEFAULT" if weights == "default" else weights)
    if chosen is None:
        raise unknown_weights(specifier, weights, [each.name for each in sets])
    return chosen


def _input_size(builder: Callable[..., Any], weights: WeightsEnum | None) -> tuple[int, ...] | None:
    transforms = weights.transforms() if weights is not None else None
    # Segmentation presets resize without a crop; detection presets leave the size to the model.
    sides = getattr(transforms, "crop_size", None) or getattr(transforms, "resize_size", None)
    if not sides:
        return None
    # The presets don't say how many frames; every video model of torchvision takes 16.
    frames = (16,) if ".video." in builder.__module__ else ()
    return (3, *frames, sides[0], sides[-1])


class _StandIn:
    """Passes for a weight set of torchvision, but gives tensors of ours instead of downloading.

    Builders choose class counts, auxiliary heads, frozen norms and epsilons by the set they are given, and
    not all of it can be asked for otherwise: only with the set do they build the same model again.
    """

    def __init__(self, weights: WeightsEnum, state_dict: Mapping[str, Tensor]):
        self._weights = weights
        self._state_dict = state_dict

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # for isinstance, with which builders check
        return type(self._weights)

    def __eq__(self, other: object) -> bool:
        return self._weights == other

    __hash__ = None  # type: ignore[assignment]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._weights, name)

    def get_state_dict(self, *args: Any, **kwargs: Any) -> Mapping[str, Tensor]:
        return self._state_dict


class _Empty(dict[str, Any]):
    """A state dict that isn't loaded within `_empty_loads_ignored`."""


@contextlib.contextmanager
def _empty_loads_ignored() -> Iterator[None]:
    original = nn.Module.load_state_dict

    def load_state_dict(self: nn.Module, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        return None if isinstance(state_dict, _Empty) else original(self, state_dict, *args, **kwargs)

    nn.Module.load_state_dict = load_state_dict  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.load_state_dict = original  # type: ignore[method-assign]
