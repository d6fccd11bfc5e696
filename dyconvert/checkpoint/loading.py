"""load: builds the static model, narrows and converts it as saved, and loads the values. No foreign code runs."""

import contextlib
import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError
from torch import nn

from dyconvert import models
from dyconvert.arguments import check_module
from dyconvert.checkpoint.description import DESCRIPTION, Description, described, read_description, source_in
from dyconvert.checkpoint.hub import local
from dyconvert.checkpoint.tensors import count_tensors, load_weights
from dyconvert.copying import copied, in_eval_mode
from dyconvert.errors import CheckpointError, PlanError
from dyconvert.limits import WEIGHTS_BYTES, LimitError, check_ordinary
from dyconvert.marks import mark_compression, mark_preprocessing, mark_source
from dyconvert.narrowing.record import rebuild_narrowed
from dyconvert.surgery.compress import compress_in_place
from dyconvert.surgery.convert import rebuild
from dyconvert.surgery.old_plans import old_prefixes

# Tries to load, if other processes save the same model again and again.
_ATTEMPTS = 100


class _Replaced(CheckpointError):
    """The weights aren't, or are no longer, those that the description names."""


def load(directory: str | Path, model: nn.Module | None = None, *, trust_code: bool = False) -> nn.Module:
    """Load a model that :func:`save` wrote, in eval mode, on the CPU or on `model`'s device, in the dtype saved.

    Args:
        directory: the saved model's directory, or its address on the Hugging Face Hub: `"hf://user/name"`, or
            `"hf://user/name@revision"` for a commit, tag or branch.
        model: the static architecture at its original width, with any weights; it isn't changed. On the meta device it
            needs no memory, and the loaded model comes onto the CPU. None: it is built from its source.
        trust_code: run the source's code, if the source is a Python file or module of the user's own; and pass all
            saved arguments to the library's builder.

    Raises:
        CheckpointError: no model was saved there; the files were altered or truncated, or are of a newer version; the
            architecture doesn't fit; `model` is needed; the Hub has no such model, or can't be reached.
    """
    directory = local(directory)
    if model is not None:
        check_module(model)
    text = read_description(directory)
    for attempt in itertools.count(1):
        description = described(text, directory)
        try:
            return _load(directory, description, model, trust_code)
        except CheckpointError as error:
            # Another process may have saved meanwhile: then the description and the weights are of two models.
            before, text = text, read_description(directory)
            if text == before and not (isinstance(error, _Replaced) and attempt < _ATTEMPTS):
                raise
    raise AssertionError("the loop has no end of its own")


def _load(directory: Path, description: Description, model: nn.Module | None, trust_code: bool) -> nn.Module:
    weights = directory / description.weights
    source = source_in(description, directory)
    with _opened(weights, description.sha256):
        try:
            static = _build(source, directory, trust_code, weights) if model is None else copied(model)
            if description.narrowing is not None:
                static = rebuild_narrowed(static, description.narrowing)
            result = static if description.plan is None else rebuild(static, description.plan)
            if description.compression is not None:
                compression = description.compression
                compress_in_place(result, compression.dtype, compression.predictors, fill=False)
            load_weights(result, weights, description.extra_state, old_prefixes(description.plan))
        except (PlanError, RuntimeError, SafetensorError, LimitError) as error:
            raise CheckpointError(
                f"The architecture isn't the one that was saved in {directory}: {_first_lines(error)}. "
                "Pass the static model that it was made from as `model=...`."
            ) from error
    if source is not None:
        mark_source(result, source)
    if description.compression is not None:
        mark_compression(result, description.compression)
    if description.preprocessing is not None:
        mark_preprocessing(result, description.preprocessing)
    return in_eval_mode(result)


@contextlib.contextmanager
def _opened(weights: Path, sha256: str) -> Iterator[None]:
    """Check that the file is the saved one, and after the block that it hasn't been replaced."""
    try:
        check_ordinary(weights)
        # Hashing a sparse file, which takes no disk, could take hours.
        if os.path.getsize(weights) > WEIGHTS_BYTES:
            raise LimitError(f"it has more than {WEIGHTS_BYTES:,} bytes")
        with open(weights, "rb") as stream:
            digest = hashlib.sha256()
            while block := stream.read(1 << 20):  # Python 3.10 has no hashlib.file_digest
                digest.update(block)
            try:
                if digest.hexdigest() != sha256:
                    raise CheckpointError(f"{weights} was truncated or altered after it was saved. Copy it again.")
                yield
            finally:
                # Another save replaces files, and never writes into them. So an error in a replaced file doesn't count.
                if not _is_there(stream, weights):
                    raise _Replaced(f"{weights} was replaced while it was read. Load it again.")
    except FileNotFoundError:
        raise _Replaced(f"{weights} is missing. Copy the whole directory again.") from None
    except PermissionError as error:
        raise CheckpointError(
            f"{weights} can't be read: {error.strerror}. Give yourself the right to read it."
        ) from error
    except (OSError, LimitError) as error:
        raise CheckpointError(f"{weights} can't be read: {error}. Copy the directory again.") from error


def _is_there(stream: BinaryIO, file: Path) -> bool:
    """Whether an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), os.stat(file))
    except FileNotFoundError:
        return False


def _build(source: "models.Source | None", directory: Path, trust_code: bool, weights: Path) -> nn.Module:
    if source is None:
        raise CheckpointError(f"{directory} doesn't say where its static model comes from. Pass it as `model=...`.")
    if trust_code:
        return models.build(source)
    if source.runs_user_code:
        raise CheckpointError(
            f"{directory} was made from {source.specifier}, which is code that loading would run. Pass the static "
            "model as `model=...`, or, if you trust that code, `trust_code=True`."
        )
    if refused := models.untrusted(source):
        raise CheckpointError(
            f"{directory / DESCRIPTION} has {source.specifier} built with {refused}, and only arguments that shape an "
            "architecture are passed on from a file. Pass the static model as `model=...`, or, if you "
            "trust the file, `trust_code=True`."
        )
    return models.build_without_values(source, count_tensors(weights))


def _first_lines(error: Exception) -> str:
    # torch lists every key that differs; the first ones are enough.
    return " ".join(line.strip() for line in str(error).splitlines()[:2]).rstrip(". ")
