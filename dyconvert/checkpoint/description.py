"""`dyconvert.json`: names the weights, and holds the plan, the narrowing, their hashes, and the model's source."""

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from dyconvert import models
from dyconvert.errors import CheckpointError
from dyconvert.installation import upgrade_command
from dyconvert.limits import JSON_BYTES, PLAN_VALUES, parse_json, read_text
from dyconvert.narrowing.record import Narrowing
from dyconvert.surgery.compress import Compression
from dyconvert.surgery.plan import Plan, problems
from dyconvert.transforms import Preprocessing
from dyconvert.version import __version__

SCHEMA = 1
DESCRIPTION = "dyconvert.json"
# dyconvert.json names the one in use; the next save writes the other one.
WEIGHTS = ("model.safetensors", "model-1.safetensors")


class Description(BaseModel):
    """The content of `dyconvert.json`.

    Attributes:
        source: of the static model; None if it isn't known.
        plan: None for a static model.
        narrowing: None for a model of the original width.
        extra_state: the values that modules' `get_extra_state` returned, by their keys in the state dict.
        preprocessing: of the model's images, with the classes' names.
        compression: of the experts; None if they aren't compressed.
    """

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
    extra_state: dict[str, Any] | None = None
    preprocessing: Preprocessing | None = None
    compression: Compression | None = None

    def to_json(self) -> str:
        """The file's text."""
        # Older versions of dyconvert refuse keys that they don't know.
        unused = {name for name in ("extra_state", "preprocessing", "compression") if getattr(self, name) is None}
        # pydantic's own writer fails on paths that aren't valid text.
        return json.dumps(self.model_dump(mode="json", exclude=unused), indent=2)


def describe(directory: str | Path) -> Description:
    """Read and check `dyconvert.json`.

    Raises:
        CheckpointError: it is missing, is no JSON, or is of a newer version.
    """
    return described(read_description(directory), directory)


def read_description(directory: str | Path) -> str:
    """The text of `dyconvert.json`.

    Raises:
        CheckpointError: it is missing, or can't be read.
    """
    file = Path(directory) / DESCRIPTION
    try:
        return read_text(file, JSON_BYTES)
    except FileNotFoundError:
        raise CheckpointError(f"{directory} has no {DESCRIPTION}: no model was saved there by dyconvert.") from None
    except PermissionError as error:
        raise CheckpointError(f"{file} can't be read: {error.strerror}. Give yourself the right to read it.") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} can't be read: {error}. Copy the directory again.") from error


def described(text: str, directory: str | Path) -> Description:
    """Parse and check the text of `dyconvert.json`.

    Raises:
        CheckpointError: it is no JSON, was altered, or is of a newer version.
    """
    file = Path(directory) / DESCRIPTION
    try:
        content = parse_json(text, PLAN_VALUES)
    except ValueError as error:
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
    # A plan with another activation, for example, would load without an error and compute something else.
    if json_sha256(content["plan"]) != description.plan_sha256:
        raise CheckpointError(f"The plan in {file} was altered after it was saved. Copy the file again.")
    narrowing = content.get("narrowing")
    if narrowing is not None and json_sha256(narrowing) != description.narrowing_sha256:
        raise CheckpointError(f"The narrowing in {file} was altered after it was saved. Copy the file again.")
    if description.weights not in WEIGHTS:
        raise CheckpointError(f"{file} names {description.weights!r} as its weights; it was altered.")
    return description


def source_in(description: Description, directory: Path) -> "models.Source | None":
    """The source of the static model.

    Raises:
        CheckpointError: the entry isn't what dyconvert writes.
    """
    if description.source is None:
        return None
    try:
        return models.Source.from_json(description.source, directory)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"The source in {directory / DESCRIPTION} isn't what dyconvert writes: {error}. Was it edited?"
        ) from None


def json_sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


def source_of(directory: str | Path) -> "models.Source | None":
    """The source of a saved model's static model.

    Raises:
        CheckpointError: as in `describe`.
    """
    return source_in(describe(directory), Path(directory))
