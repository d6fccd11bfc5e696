"""save: the one step that makes a save valid replaces `dyconvert.json`, so a killed process leaves the old model."""

import errno
import hashlib
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from dyconvert import models
from dyconvert.arguments import check_module
from dyconvert.checkpoint.card import CARD, Figures, counted, may_replace, model_card
from dyconvert.checkpoint.description import DESCRIPTION, WEIGHTS, Description, json_sha256
from dyconvert.checkpoint.hub import check_repo, push
from dyconvert.checkpoint.tensors import is_ours, write_weights
from dyconvert.errors import CheckpointError
from dyconvert.files import names_in, private_folder, settle, write_errors_as
from dyconvert.limits import JSON_BYTES, parse_json, read_text
from dyconvert.locks import locked
from dyconvert.marks import compression_of, mark_preprocessing, mark_source, narrowing_of, preprocessing_of, source_of
from dyconvert.nn import DynamicConv
from dyconvert.paths import as_path
from dyconvert.surgery.current import current_plan
from dyconvert.surgery.plan import Plan
from dyconvert.transforms import Preprocessing
from dyconvert.version import __version__


def save(
    model: nn.Module,
    directory: str | Path,
    *,
    source: "models.Source | None" = None,
    force: bool = False,
    static: bool = False,
    preprocessing: Preprocessing | None = None,
    figures: Figures | None = None,
    push_to: str | None = None,
) -> Path:
    """Save a converted or narrowed model, trained or not.

    If several processes save to one directory, they wait for each other, and the last one's model stays.

    Args:
        model: the model that :func:`~dyconvert.convert`, :func:`~dyconvert.narrow` or :func:`load` returned.
        directory: it is created if it doesn't exist. A model that was saved there before is replaced, in one step.
        source: the source of the static model, with which :func:`load` builds it. None: the source that the model was
            loaded with; without one, :func:`load` needs the static model.
        force: write into a directory that holds other files; they stay as they are.
        preprocessing: the preprocessing of images, with the classes' names. None: the one that the model was
            fine-tuned, saved or loaded with, if there is one.
        figures: rows of the model card's table: names with values before and after. Whole numbers are counts, others
            percentages. None: the parameters.
        push_to: also put the model onto the Hugging Face Hub, as `"user/name"`; see :func:`~dyconvert.push`.
        static: also accept a model that was neither converted nor narrowed, as a control.

    Returns:
        The directory.

    Raises:
        ModelError: the model was neither converted nor narrowed, and `static` is false; or its state can't be saved.
        CheckpointError: the directory holds other files, or can't be written. Its files are unchanged.

    Examples:
        >>> import dyconvert, torch
        >>> from dyconvert.builtin import DigitsResNet8
        >>> model, image = DigitsResNet8().eval(), torch.rand(2, 1, 8, 8)
        >>> dynamic = dyconvert.convert(model, g=4, example=image)
        >>> import tempfile
        >>> directory = tempfile.mkdtemp() + "/mine"
        >>> _ = dyconvert.save(dynamic, directory)
        >>> again = dyconvert.load(directory, model)
        >>> torch.equal(again(image), dynamic(image))
        True
    """
    check_module(model)
    if source is not None and not isinstance(source, models.Source):
        raise CheckpointError(f"source has to be what models.create returned, not a {type(source).__name__}.")
    if preprocessing is not None and not isinstance(preprocessing, Preprocessing):
        raise CheckpointError(
            f"preprocessing has to be a dyconvert.Preprocessing, not a {type(preprocessing).__name__}."
        )
    if push_to is not None:
        check_repo(push_to)
    narrowing = narrowing_of(model)
    plan = _plan_of(model, static or narrowing is not None)
    source = source or source_of(model)
    directory = as_path(directory, CheckpointError)
    check_writable(directory, replace=True, force=force)
    if any(t.is_meta for t in model.state_dict().values() if isinstance(t, Tensor)):
        raise CheckpointError("The model is on the meta device and has no values to save.")
    with write_errors_as(directory, CheckpointError):
        exists = directory.exists()
        if not exists:
            directory.parent.mkdir(parents=True, exist_ok=True)
        with private_folder(directory if exists else directory.parent) as folder:
            complete = folder / "complete"
            complete.mkdir()
            weights = complete / WEIGHTS[0]
            extra = write_weights(model, weights)
            settle(weights)
            description = Description(
                dyconvert=__version__,
                torch=torch.__version__,
                weights=WEIGHTS[0],
                sha256=sha256(weights),
                source=source.to_json(directory) if source else None,
                plan_sha256=json_sha256(plan and plan.model_dump(mode="json")),
                plan=plan,
                narrowing_sha256=json_sha256(narrowing and narrowing.model_dump(mode="json")),
                narrowing=narrowing,
                extra_state=extra,
                preprocessing=preprocessing or preprocessing_of(model),
                compression=compression_of(model),
            )
            card = model_card(description, counted(model) if figures is None else figures, str(directory))
            (complete / CARD).write_bytes(card.encode("utf-8", "replace"))
            settle(complete / CARD)
            if exists or not _took_its_name(complete, directory, description):
                with locked(directory):
                    _replace(complete, directory, description)
    if source is not None:
        mark_source(model, source)
    if preprocessing is not None:
        mark_preprocessing(model, preprocessing)
    if push_to is not None:
        push(directory, push_to)
    return directory


def check_writable(directory: Path, *, replace: bool = False, force: bool = False) -> None:
    """Check that a model may be saved to a directory.

    Args:
        replace: it may hold a model that dyconvert saved.
        force: it may hold anything.

    Raises:
        CheckpointError: it holds other files, or can't be read.
    """
    try:
        _check_writable(directory, replace, force)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory} can't be used: {error}. Choose another directory.") from error


def _check_writable(directory: Path, replace: bool, force: bool) -> None:
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory} is a file. Choose another directory.")
    above = next((parent for parent in directory.parents if parent.exists()), None)
    if above is not None and not above.is_dir():
        raise CheckpointError(f"{directory} can't be made: {above} is a file. Choose another directory.")
    if force or not directory.exists() or not names_in(directory):
        return
    if (directory / DESCRIPTION).exists():
        if not replace:
            raise CheckpointError(
                f"{directory} holds a model already. Choose another: `directory=...`. To replace it, add `force=True`."
            )
    else:
        raise CheckpointError(
            f"{directory} holds other files. Choose another: `directory=...`. To write beside them, add `force=True`."
        )


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):  # Python 3.10 has no hashlib.file_digest
            digest.update(block)
    return digest.hexdigest()


def _took_its_name(complete: Path, directory: Path, description: Description) -> bool:
    """Rename the complete directory to `directory`. False: another process has made it meanwhile."""
    _describe(complete, description)
    try:
        os.rename(complete, directory)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def _replace(complete: Path, directory: Path, description: Description) -> None:
    used = _used_weights(directory)
    ours = [name for name in WEIGHTS if _may_replace(directory, name)]
    name = next((name for name in ours if name != used), None)
    if name is None:
        raise CheckpointError(
            f"{directory} holds {' and '.join(WEIGHTS)}, which dyconvert didn't write. Choose another directory."
        )
    _describe(complete, description.model_copy(update={"weights": name}))
    try:
        os.replace(complete / WEIGHTS[0], directory / name)
        os.replace(complete / DESCRIPTION, directory / DESCRIPTION)
    except BaseException:
        if _used_weights(directory) != name:
            (directory / name).unlink(missing_ok=True)
        raise
    # A card that a user wrote or edited stays.
    if may_replace(directory):
        os.replace(complete / CARD, directory / CARD)
    for other in {*ours} - {name}:
        (directory / other).unlink(missing_ok=True)


def _may_replace(directory: Path, name: str) -> bool:
    # Beside a description that dyconvert wrote, a killed process may have left it.
    there = os.path.lexists(directory / name)
    return not there or os.path.lexists(directory / DESCRIPTION) or is_ours(directory / name)


def _describe(complete: Path, description: Description) -> None:
    (complete / DESCRIPTION).write_text(description.to_json(), encoding="utf-8")
    settle(complete / DESCRIPTION)


def _used_weights(directory: Path) -> str | None:
    try:
        return parse_json(read_text(directory / DESCRIPTION, JSON_BYTES)).get("weights")
    except (OSError, ValueError, AttributeError):
        return None


def _plan_of(model: nn.Module, may_be_static: bool) -> Plan | None:
    # A model with dynamic convs but no plan is a submodule or a wrapper of a converted model.
    if may_be_static and not any(isinstance(module, DynamicConv) for module in model.modules()):
        return None
    return current_plan(model)
