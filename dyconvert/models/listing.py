"""The names of the models that the libraries have, known without importing a library where that can be.

Importing torchvision and timm takes seconds, and their names change only with their versions. `names.json` holds the
names of one version of each, written by `python tests/make_model_names.py`. Those of another version are read from the
library once, and kept in the user's cache.
"""

import contextlib
import difflib
import functools
import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from dyconvert.errors import ModelError
from dyconvert.installation import install_command
from dyconvert.models.source import LIBRARIES

SHIPPED = Path(__file__).with_name("names.json")


def list_models(source: str | None = None) -> dict[str, list[str]]:
    """List the model names of each library.

    Args:
        source: "torchvision", "timm" or "builtin"; None for all that are installed.

    Raises:
        ModelError: there is no such source, or timm is asked for and isn't installed.
    """
    if source not in (None, *LIBRARIES):
        raise ModelError(f"There is no model source {source!r}; use one of {', '.join(LIBRARIES)}.")
    sources = [source] if source else [name for name in LIBRARIES if name != "timm" or importlib.util.find_spec("timm")]
    return {name: _names(name) for name in sources}


def names_of(library: str) -> list[str]:
    """The names as the library itself gives them, which imports it."""
    if library == "torchvision":
        import torchvision

        return torchvision.models.list_models()
    if library == "timm":
        return import_timm().list_models()
    from dyconvert import builtin

    return sorted(builtin.MODELS)


def unknown_model(name: str) -> ModelError:
    """Return the error for a name that its library doesn't have, with the nearest of all libraries."""
    near = [
        f"{source}:{match}"
        for source, names in list_models().items()
        for match in difflib.get_close_matches(name.lower(), names)
    ]
    hint = f"the nearest are {', '.join(near)}" if near else "no name is near it"
    return ModelError(f"There is no model {name!r}; {hint}. `dyconvert ls` lists them all.")


def import_timm() -> ModuleType:
    """Import timm when it is needed: it is optional, and `import dyconvert` shouldn't wait for it.

    Raises:
        ModelError: it isn't installed.
    """
    try:
        import timm
    except ImportError as error:
        raise ModelError(f"timm can't be imported: {error}. Run `{install_command('timm')}`.") from error
    return timm


def version_of(library: str) -> str | None:
    """The installed version of the library, or None if it isn't installed as a package."""
    try:
        return importlib.metadata.version("dyconvert" if library == "builtin" else library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _names(library: str) -> list[str]:
    if library in sys.modules or (library == "builtin" and "dyconvert.builtin" in sys.modules):
        return names_of(library)  # it is imported already, and knows what the user has registered
    if library == "builtin":
        return _shipped()["builtin"]["names"]
    version = version_of(library)
    shipped = _shipped()[library]
    if version is not None and version == shipped["version"]:
        return shipped["names"]
    return _cached(library, version)


@functools.cache
def _shipped() -> Mapping[str, Any]:
    return json.loads(SHIPPED.read_text(encoding="utf-8"))


def _cached(library: str, version: str | None) -> list[str]:
    if version is None:
        return names_of(library)
    file = _cache_folder() / f"{library}-{version}.json"
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(found, list) and all(isinstance(name, str) for name in found):
            return found
    names = names_of(library)
    # A cache that can't be written costs the next command two seconds, and nothing else.
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f"{file.name}.{os.getpid()}.part")
        part.write_text(json.dumps(names), encoding="utf-8")
        part.replace(file)
    return names


def _cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or Path.home() / ".cache"
    return Path(home) / "dyconvert" / "models"
