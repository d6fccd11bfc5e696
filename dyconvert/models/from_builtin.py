"""This package's own models, each with the one weight set that comes with it."""

from pathlib import Path

from torch import nn

from dyconvert import builtin
from dyconvert.models.building import call, unknown_model, unknown_weights
from dyconvert.models.source import Source
from dyconvert.models.weights import load_state_dict_into, read_state_dict


def builtin_model(name: str, weights: str | Path, arguments: dict, load: bool) -> tuple[nn.Module, Source]:
    """Make a model of this package; give it `weights`, a name or a Path, unless `load` is False."""
    if name not in builtin.MODELS:
        raise unknown_model(name)
    entry = builtin.MODELS[name]
    specifier = f"builtin:{name}"
    if weights == "default":
        weights = entry.weights_name
    if isinstance(weights, str) and weights not in (entry.weights_name, "none"):
        raise unknown_weights(specifier, weights, [entry.weights_name])
    model = call(specifier, entry.factory, arguments)
    if load and weights != "none":
        path = weights if isinstance(weights, Path) else entry.weights_path
        load_state_dict_into(model, read_state_dict(path), path)
    recorded = None if weights == "none" else str(weights)
    return model, Source(specifier, arguments, recorded, entry.input_size)
