"""Writes a model's state to a safetensors file and reads it, without pickle: tied tensors once, extra state as JSON."""

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

# The dtypes that a loaded model's tensors take from the file, by safetensors' names.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SAVED = {
    *_DTYPES.values(), torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64,
    torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2,
}  # fmt: skip
# A key of the file's header: dyconvert wrote the file, and may replace it.
_WRITTEN_BY = "written_by"
_VERSIONS = "versions"  # of modules; no tensor's name


def write_weights(model: nn.Module, file: Path) -> dict[str, Any] | None:
    """Write the tensors of a model's state dict.

    A tensor with several names is written under the first; the file's header has the others, in the form of
    safetensors' own `save_model`.

    Returns:
        The modules' extra state that isn't tensors; None if there is none.

    Raises:
        ModelError: the state can't be saved without pickle.
        OSError, SafetensorError: the file can't be written.
    """
    state = model.state_dict(keep_vars=True)
    tensors, extra = _tensors_and_extra(state)
    first: dict[int, str] = {}
    header = {"format": "pt", _WRITTEN_BY: f"dyconvert {__version__}", _VERSIONS: json.dumps(versions(state))}
    plain_tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        if id(tensor) in first:
            header[name] = first[id(tensor)]
            continue
        first[id(tensor)] = name
        plain = tensor.detach().contiguous()
        # safetensors refuses tensors that share a storage. Only whole tensors under two names are tied again in
        # loading.
        if plain.numel() and plain.untyped_storage().data_ptr() in storages:
            plain = plain.clone(memory_format=torch.contiguous_format)
        storages.add(plain.untyped_storage().data_ptr())
        plain_tensors[name] = plain
    save_file(plain_tensors, file, metadata=header)
    return extra or None


def _tensors_and_extra(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
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
    """Whether dyconvert wrote this weights file, so that it may replace it."""
    try:
        check_ordinary(file)  # opening a pipe would wait for a writer
        with safe_open(file, "pt") as opened:
            return _WRITTEN_BY in (opened.metadata() or {})
    except Exception:  # no weights file that dyconvert wrote
        return False


def count_tensors(file: Path) -> int:
    """The number of tensors in a weights file.

    Raises:
        SafetensorError: it can't be read.
    """
    with safe_open(file, "pt") as opened:
        return len(opened.keys())


def load_weights(
    model: nn.Module, file: Path, extra: dict[str, Any] | None, prefixes: Mapping[str, str] | None = None
) -> None:
    """Load the saved values and dtypes into a model of the saved architecture.

    Tensors on the meta device come onto the CPU, and tied tensors stay tied.

    Args:
        extra: the saved extra state.
        prefixes: prefixes of names in older files, with those that replace them.

    Raises:
        RuntimeError: names or shapes differ.
        CheckpointError: some tensors are on the meta device and aren't saved.
        SafetensorError, LimitError: the file can't be read.
    """
    state_of_model = model.state_dict(keep_vars=True)
    places = list(_places(model))
    with safe_open(file, "pt") as stream:
        opened = _Renamed(stream, prefixes or {})
        names = opened.keys()
        if len(names) > TENSORS:
            raise LimitError(f"it has {len(names):,} tensors, and at most {TENSORS:,} are read")
        origin = _origins(state_of_model, names, extra or {})
        shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in names}
        wrong = [
            f"size mismatch for {name}: {list(shapes[origin[name]])} was saved, and the model has {list(t.shape)}"
            for name, t in state_of_model.items()
            if isinstance(t, Tensor) and shapes[origin[name]] != tuple(t.shape)
        ]
        if wrong:
            raise RuntimeError(some(wrong, 1))
        _take_dtypes(state_of_model, origin, opened)
        assign = any(isinstance(t, Tensor) and t.is_meta for t in state_of_model.values())
        like = {origin[name]: t for name, t in state_of_model.items() if assign and isinstance(t, Tensor)}
        read = {name: _read(opened, name, like.get(name)) for name in names}
        saved = _saved_versions(stream.metadata() or {})
    state = {}
    for name, value in state_of_model.items():
        if not isinstance(value, Tensor):
            state[name] = (extra or {}).get(name)
        else:
            state[name] = read[origin[name]]
    try:
        if assign:
            # torch's own method: a model's override, such as CompressAI's, may not have `assign`.
            nn.Module.load_state_dict(model, with_versions(state, model, saved), assign=True)
        else:
            model.load_state_dict(with_versions(state, model, saved))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        # Modules may read their state with code of their own.
        raise RuntimeError(f"{type(model).__name__} rejects the state that was saved: {brief(error)}") from error
    if assign:
        _tie(places)
        _check_complete(model)


def _saved_versions(header: Mapping[str, str]) -> dict[str, int] | None:
    """The versions of modules in a file's header; None in older files, which have none."""
    try:
        saved_versions = json.loads(header.get(_VERSIONS, "null"))
    except ValueError:
        return None
    is_ours = isinstance(saved_versions, dict) and all(isinstance(version, int) for version in saved_versions.values())
    return saved_versions if is_ours else None


class _Renamed:
    """A weights file whose tensors have today's names."""

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
    """A tensor of the file; with `like`, a copy on the device and in the memory format of `like`."""
    tensor = opened.get_tensor(name)
    if like is None:
        return tensor
    device = "cpu" if like.is_meta else like.device
    return torch.empty_like(like, device=device, dtype=tensor.dtype, requires_grad=False).copy_(tensor)


def _origins(state_of_model: dict[str, Any], names: list[str], extra: dict[str, Any]) -> dict[str, str]:
    """The name in the file of each of the model's tensors: its own, or that of a tensor that it is tied to."""
    known, first = set(names), dict[int, str]()
    for name, value in state_of_model.items():
        if name in known:
            first.setdefault(id(value), name)
    origin = {
        n: n if n in known else first.get(id(value), "")
        for n, value in state_of_model.items()
        if isinstance(value, Tensor)
    }
    missing = [name for name, saved in origin.items() if not saved]
    missing += [
        n
        for n, value in state_of_model.items()
        if not isinstance(value, Tensor) and value is not None and n not in extra
    ]
    unexpected = [name for name in [*names, *extra] if name not in state_of_model]
    if missing or unexpected:
        what = [f"missing {some(missing, 3)}"] if missing else []
        what += [f"of another model {some(unexpected, 3)}"] if unexpected else []
        raise RuntimeError("; ".join(what))
    return origin


def _take_dtypes(state_of_model: dict[str, Any], origin: dict[str, str], opened: Any) -> None:
    """Convert tensors to the dtypes that they were saved in: copying values keeps the model's dtypes."""
    for name, value in state_of_model.items():
        if isinstance(value, Tensor) and not value.is_meta:
            saved = _DTYPES.get(opened.get_slice(origin[name]).get_dtype())
            if saved is not None and value.dtype != saved:
                value.data = value.data.to(saved)


def _places(model: nn.Module) -> Iterator[tuple[int, dict[str, Any], str]]:
    """The table and name of each parameter and buffer, with the tensor's id."""
    for module in model.modules():
        for table in tensor_tables(module):
            for name, tensor in table.items():
                if tensor is not None:
                    yield id(tensor), table, name


def _tie(places: list[tuple[int, dict[str, Any], str]]) -> None:
    """Tie tensors again that were the same tensor before loading assigned new ones."""
    first: dict[int, Tensor] = {}
    for number, table, name in places:
        table[name] = first.setdefault(number, table[name])


def _check_complete(model: nn.Module) -> None:
    empty = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if empty:
        raise CheckpointError(
            f"{some(empty)} of the model passed as model= {'are' if len(empty) > 1 else 'is'} on the meta device, and "
            "not saved: no part of the state dict. Pass the model with their values, on the CPU."
        )
