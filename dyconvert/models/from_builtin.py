"""This package's own models, with the weights that come with it, or those of a file of the user's."""

from pathlib import Path
from typing import Any

from torch import nn

from dyconvert import builtin
from dyconvert.errors import ModelError
from dyconvert.models.building import call, unknown_weights
from dyconvert.models.listing import unknown_model
from dyconvert.models.source import Source
from dyconvert.models.weights import load_state_dict_into, read_state_dict


def builtin_model(name: str, weights: str | Path, arguments: dict[str, Any], load: bool) -> tuple[nn.Module, Source]:
    """Make a model of this package; give it `weights`, a name or a Path, unless `load` is False."""
    if name not in builtin.MODELS:
        raise unknown_model(name)
    entry = builtin.MODELS[name]
    specifier = f"builtin:{name}"
    chosen = _chosen_weights(specifier, weights, load)
    model = call(specifier, entry.factory, arguments)
    if load and chosen != "none":
        path = chosen if isinstance(chosen, Path) else entry.weights_path
        if path is not None:
            load_state_dict_into(model, read_state_dict(path), path)
    return model, Source(specifier, arguments, None if chosen == "none" else str(chosen), entry.input_size)


def _chosen_weights(specifier: str, weights: str | Path, load: bool) -> str | Path:
    """A weights file, the name of the set that comes with the package, or "none"."""
    entry = builtin.MODELS[specifier.partition(":")[2]]
    if isinstance(weights, Path):
        if not weights.is_dir():
            return weights
        file = weights / (entry.file_name or "")
        if load and not file.is_file():
            raise ModelError(
                f"The folder {weights} has no {entry.file_name or 'weights of ' + specifier}; give the path of the "
                "weights file itself."
            )
        return file
    if weights == "default":
        weights = entry.weights_name or ("default" if load else "none")
    if weights in (entry.weights_name, "none"):
        return weights
    if entry.weights_name is None:
        raise ModelError(
            f"The weights of {specifier} don't come with dyconvert. Give {entry.file_name} of {entry.origin}, or the "
            "folder that holds it, as `weights=PATH`, or random weights with `weights='none'`."
        )
    raise unknown_weights(specifier, weights, [entry.weights_name])
