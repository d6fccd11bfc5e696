"""The names of the models that the libraries have."""

import importlib.util
from types import ModuleType

import torchvision

from dyconvert import builtin
from dyconvert.errors import ModelError
from dyconvert.models.source import LIBRARIES


def list_models(source: str | None = None) -> dict[str, list[str]]:
    """List the model names of each library.

    Args:
        source: "torchvision", "timm" or "builtin"; None for all that are installed.

    Raises:
        ModelError: there is no such source, or timm is asked for and isn't installed.
    """
    if source not in (None, *LIBRARIES):
        raise ModelError(f"There is no model source {source!r}; use one of {', '.join(LIBRARIES)}.")
    names: dict[str, list[str]] = {}
    if source in (None, "torchvision"):
        names["torchvision"] = torchvision.models.list_models()
    if source == "timm" or (source is None and importlib.util.find_spec("timm")):
        names["timm"] = import_timm().list_models()
    if source in (None, "builtin"):
        names["builtin"] = sorted(builtin.MODELS)
    return names


def import_timm() -> ModuleType:
    """Import timm when it is needed: it is optional, and `import dyconvert` shouldn't wait for it.

    Raises:
        ModelError: it isn't installed.
    """
    try:
        import timm
    except ImportError as error:
        raise ModelError(f"timm can't be imported: {error}. Run `pip install 'dyconvert[timm]'`.") from error
    return timm
