"""save and load: a directory with `model.safetensors` and `dyconvert.json`, and no pickle.

`dyconvert.json` names the weights file, the plan, what was narrowed, their hashes, and where the model came from.
Replacing it is the one step that makes a save valid, so an interrupted save leaves the old directory whole.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import nn

from dyconvert import models
from dyconvert.copying import copied
from dyconvert.errors import CheckpointError, PlanError
from dyconvert.installation import upgrade_command
from dyconvert.marks import mark_source, narrowing_of, source_of
from dyconvert.narrowing.record import Narrowing, rebuild_narrowed
from dyconvert.nn import DynamicConv
from dyconvert.surgery.convert import check_converted, rebuild
from dyconvert.surgery.plan import Plan, problems
from dyconvert.version import __version__

SCHEMA = 1
DESCRIPTION = "dyconvert.json"
# Which of the two is in use stands in dyconvert.json; the other one is free to be written.
WEIGHTS = ("model.safetensors", "model-1.safetensors")

# safetensors' names of the floating dtypes.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Description(BaseModel):
    """What `dyconvert.json` holds. `plan` is None for a static model, `narrowing` for one of the original width."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA
    dyconvert: str
    torch: str
    weights: str
    sha256: str
    source: dict[str, Any] | None
    plan_sha256: str
    plan: Plan | None
    narrowing_sha256: str | None = None
    narrowing: Narrowing | None = None


def save(
    model: nn.Module,
    directory: str | Path,
    *,
    source: "models.Source | None" = None,
    force: bool = False,
    static: bool = False,
) -> Path:
    """Save a converted or narrowed model, trained or not.

    Args:
        model: what :func:`~dyconvert.convert`, :func:`~dyconvert.narrow` or :func:`load` returned.
        directory: made if need be. A model that was saved there before is replaced, in one step.
        source: where the static model came from, so that :func:`load` can build it. None: what the model was
            loaded with, if anything; else :func:`load` will need the static model.
        force: write into a directory that holds other things.
        static: save a model that wasn't converted or narrowed as well, as a control.

    Returns:
        The directory.

    Raises:
        ModelError: the model wasn't converted or narrowed, and isn't said to be static.
        CheckpointError: the directory holds something else, or can't be written. What was there is still there.
    """
    narrowing = narrowing_of(model)
    plan = _plan_of(model, static or narrowing is not None)
    source = source or source_of(model)
    directory = Path(directory)
    check_writable(directory, replace=True, force=force)
    if any(t.is_meta for t in model.state_dict().values() if isinstance(t, torch.Tensor)):
        raise CheckpointError("The model is on the meta device and has no values to save.")
    try:
        with _destination(directory) as target:
            name = WEIGHTS[0] if _used_weights(target) != WEIGHTS[0] else WEIGHTS[1]
            part = target / (name + ".part")
            save_model(model, str(part))
            _flush(part)
            os.replace(part, target / name)
            description = Description(
                dyconvert=__version__,
                torch=torch.__version__,
                weights=name,
                sha256=_sha256(target / name),
                source=source.to_json() if source else None,
                plan_sha256=_json_sha256(plan and plan.model_dump(mode="json")),
                plan=plan,
                narrowing_sha256=_json_sha256(narrowing and narrowing.model_dump(mode="json")),
                narrowing=narrowing,
            )
            part = target / (DESCRIPTION + ".part")
            part.write_text(description.model_dump_json(indent=2), encoding="utf-8")
            _flush(part)
            os.replace(part, target / DESCRIPTION)
            for other in {*WEIGHTS} - {name}:
                (target / other).unlink(missing_ok=True)
    except (OSError, SafetensorError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{directory} can't be written: {error}. Free some space or choose another directory; "
            "what was saved there before is unchanged."
        ) from error
    if source is not None:
        mark_source(model, source)
    return directory


def load(directory: str | Path, model: nn.Module | None = None, *, trust_code: bool = False) -> nn.Module:
    """Load a model that :func:`save` wrote, in eval mode, on the CPU or on `model`'s device, in the dtype saved.

    Args:
        directory: what was saved.
        model: the static architecture, of the original width, with any weights; left as it is. None: it is built
            from its source.
        trust_code: run the source's code, where the source is a Python file or module of the user's own.

    Raises:
        CheckpointError: nothing was saved there; the files were altered or truncated, or are of a newer version;
            the architecture doesn't fit, or is needed.
    """
    directory = Path(directory)
    description = describe(directory)
    weights = directory / description.weights
    if description.weights not in WEIGHTS:
        raise CheckpointError(
            f"{directory / DESCRIPTION} names {description.weights!r} as its weights; it was altered."
        )
    try:
        digest = _sha256(weights)
    except FileNotFoundError:
        raise CheckpointError(f"{weights} is missing. Copy the whole directory again.") from None
    except OSError as error:
        raise CheckpointError(f"{weights} can't be read: {error}. Copy the directory again.") from error
    if digest != description.sha256:
        raise CheckpointError(f"{weights} was truncated or altered after it was saved. Copy it again.")
    source = _source(description, directory)
    static = _build(source, directory, trust_code) if model is None else copied(model)
    try:
        if description.narrowing is not None:
            static = rebuild_narrowed(static, description.narrowing)
        model = static if description.plan is None else rebuild(static, description.plan)
        _take_dtypes(model, weights)
        load_model(model, str(weights))
    except (PlanError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(
            f"The architecture isn't the one that was saved in {directory}: {_first_lines(error)}. "
            "Pass the static model that it was made from as `model=...`."
        ) from error
    if source is not None:
        mark_source(model, source)
    return model.eval()


def describe(directory: str | Path) -> Description:
    """Read and check `dyconvert.json`.

    Raises:
        CheckpointError: it is missing, is no JSON, or is of a newer version.
    """
    file = Path(directory) / DESCRIPTION
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text)
    except FileNotFoundError:
        raise CheckpointError(f"{directory} has no {DESCRIPTION}: no model was saved there by dyconvert.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} can't be read: {error}. Copy the directory again.") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if isinstance(version, int) and version > SCHEMA:
        raise CheckpointError(
            f"{file} has schema version {version}, and this dyconvert ({__version__}) reads up to {SCHEMA}. "
            f"Upgrade: {upgrade_command()}."
        )
    try:
        description = Description.model_validate(content)
    except ValidationError as error:
        raise CheckpointError(f"{file} isn't what dyconvert writes: {problems(error)}. Was it edited?") from None
    # Another activation, say, would load without complaint and compute something else.
    if _json_sha256(content["plan"]) != description.plan_sha256:
        raise CheckpointError(f"The plan in {file} was altered after it was saved. Copy the file again.")
    narrowing = content.get("narrowing")
    if narrowing is not None and _json_sha256(narrowing) != description.narrowing_sha256:
        raise CheckpointError(f"The narrowing in {file} was altered after it was saved. Copy the file again.")
    return description


def check_writable(directory: Path, *, replace: bool = False, force: bool = False) -> None:
    """Refuse a place that holds something already.

    Args:
        replace: a model saved by dyconvert may stand there.
        force: anything may stand there.

    Raises:
        CheckpointError: something stands there that may not, or one may not look.
    """
    try:
        _check_writable(directory, replace, force)
    except OSError as error:
        raise CheckpointError(f"{directory} can't be used: {error}. Choose another directory.") from error


def _check_writable(directory: Path, replace: bool, force: bool) -> None:
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory} is a file. Choose another directory.")
    above = next((parent for parent in directory.parents if parent.exists()), None)
    if above is not None and not above.is_dir():
        raise CheckpointError(f"{directory} can't be made: {above} is a file. Choose another directory.")
    if force or not directory.exists() or not any(directory.iterdir()):
        return
    if (directory / DESCRIPTION).exists():
        if not replace:
            raise CheckpointError(
                f"{directory} holds a model already. Replace it with `force=True`, or choose another: `directory=...`."
            )
    else:
        raise CheckpointError(
            f"{directory} holds other files. Write there with `force=True`, or choose another: `directory=...`."
        )


def _plan_of(model: nn.Module, may_be_static: bool) -> Plan | None:
    # Without a plan, a model with dynamic convs is a part or a wrapper of a converted one.
    if may_be_static and not any(isinstance(module, DynamicConv) for module in model.modules()):
        return None
    return check_converted(model)


def _first_lines(error: Exception) -> str:
    # torch lists every key that differs; the first says it.
    return " ".join(line.strip() for line in str(error).splitlines()[:2]).rstrip(". ")


def _take_dtypes(model: nn.Module, weights: Path) -> None:
    """Give parameters and buffers the dtypes that they were saved in, which copying values wouldn't."""
    tensors = model.state_dict(keep_vars=True)
    with safe_open(weights, "pt") as file:
        for name in file.keys() & tensors.keys():
            saved = _DTYPES.get(file.get_slice(name).get_dtype())
            if saved is not None and tensors[name].dtype != saved:
                tensors[name].data = tensors[name].data.to(saved)


def _source(description: Description, directory: Path) -> "models.Source | None":
    if description.source is None:
        return None
    try:
        source = models.Source.from_json(description.source)
        if isinstance(source.specifier, str):
            return source
    except (KeyError, TypeError, AttributeError):
        pass
    raise CheckpointError(f"The source in {directory / DESCRIPTION} isn't what dyconvert writes. Was it edited?")


def _build(source: "models.Source | None", directory: Path, trust_code: bool) -> nn.Module:
    if source is None:
        raise CheckpointError(
            f"{directory} doesn't say where its static model comes from. Pass it: dyconvert.load(directory, model=...)."
        )
    if source.runs_user_code and not trust_code:
        raise CheckpointError(
            f"{directory} was made from {source.specifier}, which is code that loading would run. Pass the static "
            "model as `model=...`, or, if you trust that code, `trust_code=True`."
        )
    return models.build(source)


@contextmanager
def _destination(directory: Path) -> Iterator[Path]:
    """The directory itself where it exists; else one beside it that takes its name when all is written."""
    if directory.exists():
        before = {name for name in WEIGHTS if (directory / name).exists()}
        try:
            yield directory
        except BaseException:
            for name in (*WEIGHTS, DESCRIPTION):
                (directory / (name + ".part")).unlink(missing_ok=True)
            used = _used_weights(directory)
            for name in {*WEIGHTS} - ({used} if used else before):
                (directory / name).unlink(missing_ok=True)
            raise
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as temporary:
        made = Path(temporary) / directory.name
        made.mkdir()
        yield made
        os.replace(made, directory)


def _flush(file: Path) -> None:
    """Onto the disk, so that a power cut can't leave a description of weights that aren't there."""
    with open(file, "rb+") as stream:
        os.fsync(stream.fileno())


def _used_weights(directory: Path) -> str | None:
    try:
        return json.loads((directory / DESCRIPTION).read_text(encoding="utf-8")).get("weights")
    except (OSError, ValueError, AttributeError):
        return None


def _json_sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):  # Python 3.10 has no hashlib.file_digest
            digest.update(block)
    return digest.hexdigest()
