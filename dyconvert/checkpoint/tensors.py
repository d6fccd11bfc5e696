"""A model's state in a safetensors file, and back: tied tensors once, extra state as plain data, no pickle."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dyconvert.errors import CheckpointError, ModelError, brief, some
from dyconvert.limits import TENSORS, LimitError, check_ordinary
from dyconvert.state_versions import versions, with_versions
from dyconvert.torch_internals.modules import tensor_tables
from dyconvert.version import __version__

# safetensors' names of the dtypes that a model's tensors are given when they are loaded.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SAVED = {
    *_DTYPES.values(), torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64,
    torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2,
}  # fmt: skip
# What stands in the file's own header: that we wrote it, so that it may be replaced.
_WRITTEN_BY = "written_by"
_VERSIONS = "versions"  # of modules; no tensor's name


def write_weights(model: nn.Module, file: Path) -> dict[str, Any] | None:
    """Write the tensors of a model's state dict.

    A tensor that has several names is written under the first; the others stand in the file's header, as
    safetensors' own `save_model` writes them.

    Returns:
        The modules' extra state that isn't tensors, or None where there is none.

    Raises:
        ModelError: the state can't be saved without pickle.
        OSError, SafetensorError: the file can't be written.
    """
    state = model.state_dict(keep_vars=True)
    tensors, extra = _parts(state)
    first: dict[int, str] = {}
    header = {"format": "pt", _WRITTEN_BY: f"dyconvert {__version__}", _VERSIONS: json.dumps(versions(state))}
    kept: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        if id(tensor) in first:
            header[name] = first[id(tensor)]
            continue
        first[id(tensor)] = name
        plain = tensor.detach().contiguous()
        # Parts of one storage would be refused: when loading, only whole tensors under two names can be tied again.
        if plain.numel() and plain.untyped_storage().data_ptr() in storages:
            plain = plain.clone(memory_format=torch.contiguous_format)
        storages.add(plain.untyped_storage().data_ptr())
        kept[name] = plain
    save_file(kept, file, metadata=header)
    return extra or None


def _parts(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, extra = {}, {}
    for name, value in state.items():
        if isinstance(value, Tensor):
            if value.layout is not torch.strided or value.dtype not in _SAVED:
                what = f"{value.dtype}".removeprefix("torch.") if value.layout is torch.strided else f"{value.layout}"
                raise ModelError(
                    f"{name} is a tensor of {what}, which safetensors doesn't hold. Convert it before saving."
                )
            tensors[name] = value
            continue
        if value is None:
            continue
        try:
            if json.loads(json.dumps(value, allow_nan=False)) != value:
                raise ValueError("it holds tuples, or keys that are no strings")
        except (TypeError, ValueError, RecursionError) as error:
            raise ModelError(
                f"{name} is a {type(value).__name__} that can't be saved without pickle: {error}. Have "
                "get_extra_state return a tensor, or numbers, strings, lists and dicts of them."
            ) from None
        extra[name] = value
    return tensors, extra


def is_ours(file: Path) -> bool:
    """Whether we wrote this weights file, or may take it for ours: it may be replaced."""
    try:
        check_ordinary(file)  # a pipe would be waited for
        with safe_open(file, "pt") as opened:
            return _WRITTEN_BY in (opened.metadata() or {})
    except Exception:  # whatever it is, it isn't ours
        return False


def count_tensors(file: Path) -> int:
    """How many tensors a weights file has.

    Raises:
        SafetensorError: it can't be read.
    """
    with safe_open(file, "pt") as opened:
        return len(opened.keys())


def load_weights(
    model: nn.Module, file: Path, extra: dict[str, Any] | None, prefixes: Mapping[str, str] | None = None
) -> None:
    """Give a model of the saved architecture, in place, the saved values and dtypes; tensors on the meta device come
    onto the CPU, and tied ones stay tied.

    Args:
        prefixes: names that begin so in an older file, and how they begin now.

    Raises:
        RuntimeError: names or shapes differ.
        CheckpointError: some tensors are on the meta device and aren't saved.
        SafetensorError, LimitError: the file can't be read.
    """
    own = model.state_dict(keep_vars=True)
    places = list(_places(model))
    with safe_open(file, "pt") as stream:
        opened = _Renamed(stream, prefixes or {})
        names = opened.keys()
        if len(names) > TENSORS:
            raise LimitError(f"it has {len(names):,} tensors, and at most {TENSORS:,} are read")
        origin = _origins(own, names, extra or {})
        shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in names}
        wrong = [
            f"size mismatch for {name}: {list(shapes[origin[name]])} was saved, and the model has {list(t.shape)}"
            for name, t in own.items()
            if isinstance(t, Tensor) and shapes[origin[name]] != tuple(t.shape)
        ]
        if wrong:
            raise RuntimeError(some(wrong, 1))
        _take_dtypes(own, origin, opened)
        assign = any(isinstance(t, Tensor) and t.is_meta for t in own.values())
        like = {origin[name]: t for name, t in own.items() if assign and isinstance(t, Tensor)}
        read = {name: _read(opened, name, like.get(name)) for name in names}
        saved = _saved_versions(stream.metadata() or {})
    state = {}
    for name, value in own.items():
        if not isinstance(value, Tensor):
            state[name] = (extra or {}).get(name)
        else:
            state[name] = read[origin[name]]
    try:
        if assign:
            # By torch's own: a model's override, as CompressAI's, may not know of assigning.
            nn.Module.load_state_dict(model, with_versions(state, model, saved), assign=True)
        else:
            model.load_state_dict(with_versions(state, model, saved))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        # A module's own code reads its part of the state.
        raise RuntimeError(f"{type(model).__name__} rejects the state that was saved: {brief(error)}") from error
    if assign:
        _tie(places)
        _check_complete(model)


def _saved_versions(header: Mapping[str, str]) -> dict[str, int] | None:
    """The versions of modules in a file's header; None where there are none, as in files of before."""
    try:
        found = json.loads(header.get(_VERSIONS, "null"))
    except ValueError:
        return None
    is_ours = isinstance(found, dict) and all(isinstance(version, int) for version in found.values())
    return found if is_ours else None


class _Renamed:
    """A weights file whose tensors go by today's names."""

    def __init__(self, opened: Any, prefixes: Mapping[str, str]) -> None:
        self._opened = opened
        self._saved_as = {}
        for name in opened.keys():  # noqa: SIM118  # it is no dict
            old = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
            self._saved_as[prefixes[old] + name[len(old) :] if old else name] = name

    def keys(self) -> list[str]:
        return list(self._saved_as)

    def get_slice(self, name: str) -> Any:
        return self._opened.get_slice(self._saved_as[name])

    def get_tensor(self, name: str) -> Tensor:
        return self._opened.get_tensor(self._saved_as[name])


def _read(opened: Any, name: str, like: Tensor | None) -> Tensor:
    """A tensor of the file; to take the place of another, with memory of its own, in the other's order."""
    tensor = opened.get_tensor(name)
    if like is None:
        return tensor
    device = "cpu" if like.is_meta else like.device
    return torch.empty_like(like, device=device, dtype=tensor.dtype, requires_grad=False).copy_(tensor)


def _origins(own: dict[str, Any], names: list[str], extra: dict[str, Any]) -> dict[str, str]:
    """The name in the file of each of the model's tensors: its own, or another that it has."""
    known, first = set(names), dict[int, str]()
    for name, value in own.items():
        if name in known:
            first.setdefault(id(value), name)
    origin = {n: n if n in known else first.get(id(value), "") for n, value in own.items() if isinstance(value, Tensor)}
    missing = [name for name, saved in origin.items() if not saved]
    missing += [n for n, value in own.items() if not isinstance(value, Tensor) and value is not None and n not in extra]
    unexpected = [name for name in [*names, *extra] if name not in own]
    if missing or unexpected:
        what = [f"missing {some(missing, 3)}"] if missing else []
        what += [f"of another model {some(unexpected, 3)}"] if unexpected else []
        raise RuntimeError("; ".join(what))
    return origin


def _take_dtypes(own: dict[str, Any], origin: dict[str, str], opened: Any) -> None:
    """Give tensors the dtypes that they were saved in, which copying values wouldn't."""
    for name, value in own.items():
        if isinstance(value, Tensor) and not value.is_meta:
            saved = _DTYPES.get(opened.get_slice(origin[name]).get_dtype())
            if saved is not None and value.dtype != saved:
                value.data = value.data.to(saved)


def _places(model: nn.Module) -> Iterator[tuple[int, dict[str, Any], str]]:
    """Where each parameter and buffer stands."""
    for module in model.modules():
        for table in tensor_tables(module):
            for name, tensor in table.items():
                if tensor is not None:
                    yield id(tensor), table, name


def _tie(places: list[tuple[int, dict[str, Any], str]]) -> None:
    """Tie tensors again that were one tensor before they were assigned."""
    first: dict[int, Tensor] = {}
    for number, table, name in places:
        table[name] = first.setdefault(number, table[name])


def _check_complete(model: nn.Module) -> None:
    left = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if left:
        raise CheckpointError(
            f"{some(left)} of the model passed as model= {'are' if len(left) > 1 else 'is'} on the meta device, and "
            "not saved: no part of the state dict. Pass the model with their values, on the CPU."
        )
