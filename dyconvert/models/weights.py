"""Weights files: read without running their code, and copied into a model whole or not at all."""

import os
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from dyconvert.errors import ModelError, brief, some
from dyconvert.limits import check_archive
from dyconvert.paths import as_path
from dyconvert.state_versions import versions, with_versions
from dyconvert.torch_internals.compiling import ORIGINAL
from dyconvert.torch_internals.messages import refused_code, says_torchscript
from dyconvert.torch_internals.modules import set_versions, versions_of

_NESTED_UNDER = ("state_dict", "model", "model_state", "model_state_dict", "state_dict_ema")
_WRAPPER_PREFIXES = ("module.", f"{ORIGINAL}.")  # of DataParallel and torch.compile
_HOW_TO_SAVE = "save `model.state_dict()`, with torch.save or as safetensors"


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the tensors of a weights file onto the CPU; code in the file is never run.

    The file is safetensors (by its suffix), or what torch.save made of a state dict, plain or under
    "state_dict", "model" and the like. The key prefixes of DataParallel and torch.compile are removed.

    Raises:
        ModelError: the file is missing or damaged, or holds other things than tensors.
    """
    path = as_path(path, ModelError)
    if not _is_file(path):
        raise ModelError(f"There is no weights file {path}; give the path of an existing file.")
    loaded = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if isinstance(loaded, dict):
        nested = (loaded[key] for key in _NESTED_UNDER if isinstance(loaded.get(key), dict))
        loaded = next(nested, loaded)
    if not isinstance(loaded, dict) or not loaded:
        what = "nothing" if loaded == {} else f"a {type(loaded).__name__}"
        raise ModelError(f"{path} holds {what} instead of a state dict; {_HOW_TO_SAVE}.")
    others = [f"{key} ({type(value).__name__})" for key, value in loaded.items() if not isinstance(value, Tensor)]
    if others:
        raise ModelError(f"{path} isn't a state dict: {some(others)} aren't tensors; {_HOW_TO_SAVE}.")
    state_dict: Any = OrderedDict((str(key), tensor) for key, tensor in loaded.items())
    if isinstance(beside := versions_of(loaded), dict):
        set_versions(state_dict, beside)
    while prefix := next((p for p in _WRAPPER_PREFIXES if all(key.startswith(p) for key in state_dict)), None):
        state_dict = {key.removeprefix(prefix): tensor for key, tensor in state_dict.items()}
    return cast(dict[str, Tensor], state_dict)


def load_state_dict_into(model: nn.Module, state_dict: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Copy `state_dict`, all of it, into `model`; only `num_batches_tracked` may be missing from it.

    Args:
        path: the file to name in the error.

    Raises:
        ModelError: keys or shapes differ; the model stays as it was.
    """
    own = model.state_dict()
    state_dict = _within_wrapper(own, state_dict, path)
    missing = [key for key in own if key not in state_dict and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state_dict if key not in own]
    reshaped = [
        f"{key} (file {list(tensor.shape)}, model {list(own[key].shape)})"
        for key, tensor in state_dict.items()
        if key in own and tensor.shape != own[key].shape
    ]
    recast = [
        f"{key} (file {_kind(tensor)}, model {_kind(own[key])})"
        for key, tensor in state_dict.items()
        if key in own and _kind(tensor) != _kind(own[key])
    ]
    if missing or unexpected or reshaped or recast:
        problems = {
            "missing": missing,
            "unexpected": unexpected,
            "of another shape": reshaped,
            "of another kind of number": recast,
        }
        listed = "".join(f"\n  {len(keys)} {what}: {some(keys)}" for what, keys in problems.items() if keys)
        raise ModelError(
            f"{path} doesn't fit the model, which has {len(own)} tensors; the file has{listed}\n"
            "Name the model that the file was saved from, with its arguments. Such are `arguments={'num_classes': 10}`."
        )
    # A file of another program's, or a part of one, has no versions; its names and shapes are today's.
    known = versions(state_dict) if versions_of(state_dict) is not None else None
    try:
        model.load_state_dict(with_versions(state_dict, model, known), strict=False)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(
            f"{path} doesn't fit the model, whose own code rejects it: {brief(error)}. Load "
            "it as that code wants it, and pass the model."
        ) from error


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError) as error:
        raise ModelError(f"{str(path)!r} can't be used as a path: {error}; give that of an existing file.") from None


def _kind(tensor: Tensor) -> str:
    """The kind of numbers that a dtype holds. A cast within a kind changes precision, one between kinds the results."""
    if tensor.is_floating_point():
        return "floats"
    if tensor.is_complex():
        return "complex numbers"
    # A count may be kept in any of them.
    return "integers" if not tensor.is_quantized else "quantized numbers"


def _within_wrapper(own: Mapping[str, Tensor], state_dict: Mapping[str, Tensor], path: Any) -> Mapping[str, Tensor]:
    """The part of a state dict that is the model's, where it was saved as an attribute of another module.

    Lightning's checkpoints are of such modules: `model.conv1.weight`, beside what belongs to the loss or to a metric.
    """
    needed = [key for key in own if not key.endswith("num_batches_tracked")]
    if not needed or needed[0] in state_dict:
        return state_dict
    prefixes = [key.removesuffix(needed[0]) for key in state_dict if key.endswith(f".{needed[0]}")]
    whole = [prefix for prefix in prefixes if all(prefix + key in state_dict for key in needed)]
    if not whole:
        return state_dict
    # If a teacher or an average of the same architecture stands beside it, the model itself has the shortest name.
    prefix = "model." if "model." in whole else min(whole, key=len)
    others = [key for key in state_dict if not key.startswith(prefix)]
    if others:
        warnings.warn(
            f"{path}: the model's tensors are those under {prefix.rstrip('.')!r}; {len(others)} others aren't read: "
            f"{some(others, 3)}.",
            stacklevel=3,
        )
    return {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} can't be read as safetensors: {error}. It is cut short, damaged, or of another kind; get it again."
        ) from error


def _read_torch(path: Path) -> Any:
    # Only zip archives, torch's format since 1.6, can be mapped into memory.
    try:
        check_archive(path)
        mmap = zipfile.is_zipfile(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the errors below say it better
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:
        code = refused_code(str(error))
        if code:
            raise ModelError(
                f"{path} holds more than tensors: loading it would run code, here {code}, and only tensors "
                f"are loaded. If you trust the file, load it yourself and {_HOW_TO_SAVE}."
            ) from error
        if says_torchscript(str(error)):
            raise ModelError(f"{path} is a TorchScript program, not a state dict; {_HOW_TO_SAVE}.") from error
        raise ModelError(
            f"{path} can't be read as a PyTorch file: {brief(error)}. It is cut short, damaged, or of another "
            "kind; get it again."
        ) from error
