"""Models that a factory of the user's own returns, in a module or a file."""

import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from dyconvert.errors import ModelError, brief, some
from dyconvert.limits import CODE_BYTES, LimitError, read_bytes
from dyconvert.models.building import call
from dyconvert.models.source import LIBRARIES, Source, absolute
from dyconvert.models.weights import load_state_dict_into, read_state_dict


def factory_model(
    specifier: str, weights: str | Path, arguments: dict[str, Any], load: bool
) -> tuple[nn.Module, Source]:
    """Make what a factory returns; give it `weights`, a name or a Path, unless `load` is False."""
    if isinstance(weights, str) and weights not in ("default", "none"):
        raise ModelError(
            f"{specifier} is a factory and has no weights named {weights!r}; give a file with `weights=FILE`, "
            "or have the factory load them."
        )
    location, _, factory_name = specifier.rpartition(":")
    is_file = location.endswith(".py")
    if is_file:
        location = str(absolute(location))
    # The factory may import its neighbours only when it runs.
    with _importable(os.path.dirname(location) if is_file else os.getcwd()):
        module = _run_file(location) if is_file else _import_module(location)
        factory = getattr(module, factory_name, None)
        if not callable(factory):
            own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
            near = difflib.get_close_matches(factory_name, own) or own
            hint = f"use {some([f'{location}:{key}' for key in near])}" if near else "it has none at all"
            raise ModelError(f"{location} has no factory {factory_name!r}; {hint}.")
        model = call(f"{location}:{factory_name}", factory, arguments)
    recorded = None
    if isinstance(weights, Path):
        recorded = str(weights)
        if load:
            load_state_dict_into(model, read_state_dict(weights), weights)
    return model.cpu(), Source(f"{location}:{factory_name}", arguments, recorded, None)


@contextlib.contextmanager
def _importable(folder: str) -> Iterator[None]:
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        if not name or (isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}.")):
            near = difflib.get_close_matches(name, LIBRARIES, n=1)
            hint = f" Is it `{near[0]}:`?" if near else ""
            raise ModelError(
                f"There is no model source or module {name!r}.{hint} A model is torchvision:NAME, timm:NAME, "
                "builtin:NAME, package.module:FACTORY or path/to/file.py:FACTORY."
            ) from error
        raise ModelError(f"{name} can't be imported: {brief(error)}. Correct it first.") from error


def _run_file(path: str) -> ModuleType:
    """Run a Python file as a module; once for the same contents, for pickle needs the same classes again."""
    try:
        contents = read_bytes(Path(path), CODE_BYTES)
    except (OSError, LimitError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ModelError(f"The model file {path} can't be read: {reason}; check the path.") from error
    digest = hashlib.sha256(os.fsencode(path) + b"\0" + contents).hexdigest()[:12]
    name = re.sub(r"\W", "_", f"dyconvert_file_{Path(path).stem}_{digest}")
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ModelError(f"{path} isn't a Python file. Name one that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise ModelError(f"{path} can't be run: {brief(error)}. Correct it first.") from error
    return module
