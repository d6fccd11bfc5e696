"""Saved models on the Hugging Face Hub: `hf://user/name@revision`, with the same two files as in a directory.

Only `dyconvert.json` and the weights that it names are fetched, after their sizes are checked. No code of theirs runs.
"""

import json
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dyconvert.checkpoint.card import CARD, at_address, is_own
from dyconvert.checkpoint.description import DESCRIPTION, WEIGHTS, described, read_description
from dyconvert.errors import CheckpointError, brief
from dyconvert.installation import install_command
from dyconvert.limits import CARD_BYTES, JSON_BYTES, WEIGHTS_BYTES, LimitError, check_ordinary, read_text
from dyconvert.paths import as_path
from dyconvert.version import __version__

# An address that went through pathlib.Path has one slash.
_ADDRESS = re.compile(r"hf:/{1,2}(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^@]+))?/?")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def is_address(place: str | os.PathLike[str]) -> bool:
    """Whether a place is an address on the Hub, not a directory."""
    return isinstance(place, str | os.PathLike) and re.match("hf:/", str(place)) is not None


def local(place: str | os.PathLike[str]) -> Path:
    """The directory of a saved model. For an address on the Hub, its files are fetched into the Hub's cache first.

    Raises:
        CheckpointError: the Hub has no such model, can't be reached, or the files are too large.
    """
    if not is_address(place):
        return as_path(place, CheckpointError)
    match = _ADDRESS.fullmatch(str(place))
    if match is None or not _REPO.fullmatch(match["repo"]):
        raise CheckpointError(f"{place} is no address of a model. Write hf://user/name, or hf://user/name@revision.")
    repo, revision = match["repo"], match["revision"]
    _check_extra()
    file = Path(_fetched(repo, DESCRIPTION, revision, JSON_BYTES))
    folder = file.parent
    # The folder's name is the commit: so both files are of the same commit.
    weights = described(read_description(folder), folder).weights
    _fetched(repo, weights, folder.name, WEIGHTS_BYTES)
    return folder


def push(directory: str | Path, repo: str) -> str:
    """Put a saved model onto the Hugging Face Hub, in one commit.

    A card (README.md) that was edited on the Hub stays, unless the local card was edited too. Paths of this machine are
    left out. If the repository doesn't exist, a public one is created.

    Args:
        directory: the directory that :func:`~dyconvert.save` or a fine-tuning run wrote.
        repo: `"user/name"`. Log in before (`hf auth login`), or set the variable HF_TOKEN.

    Returns:
        The address for :func:`~dyconvert.load`, with its revision: `"hf://user/name@..."`.

    Raises:
        CheckpointError: the directory holds no saved model, or the Hub can't be written to.
    """
    check_repo(repo)
    directory = as_path(directory, CheckpointError)
    description = described(read_description(directory), directory)
    weights = directory / description.weights
    try:
        check_ordinary(weights)
    except (OSError, LimitError) as error:
        raise CheckpointError(f"{weights} can't be read: {error}. Save the model again.") from None
    content = json.loads(description.model_copy(update={"weights": WEIGHTS[0]}).to_json())
    if content["source"] is not None:
        content["source"].pop("absolute", None)
        for key in ("specifier", "weights"):
            content["source"][key] = _without_folders(content["source"][key])
    import huggingface_hub as hub

    api = hub.HfApi(endpoint=_endpoint(), library_name="dyconvert", library_version=__version__)
    try:
        api.create_repo(repo, exist_ok=True)
        changes = [
            hub.CommitOperationAdd(DESCRIPTION, json.dumps(content, indent=2).encode()),
            hub.CommitOperationAdd(WEIGHTS[0], str(weights)),
        ]
        if (card := _card(api, repo, directory)) is not None:
            changes.append(hub.CommitOperationAdd(CARD, card.encode("utf-8", "replace")))
        done = api.create_commit(repo, changes, commit_message=f"Model saved by dyconvert {__version__}")
    except Exception as error:
        raise CheckpointError(_message(error, repo, None, "written to")) from error
    return f"hf://{repo}@{done.oid}"


def check_repo(repo: Any) -> None:
    """Check a repository's name before the work is done.

    Raises:
        CheckpointError: it is no name of a repository, or huggingface_hub isn't installed.
    """
    if not isinstance(repo, str) or not _REPO.fullmatch(repo):
        raise CheckpointError(f"{repo!r:.80} is no name of a repository on the Hub. Write user/name.")
    _check_extra()


def _check_extra() -> None:
    if find_spec("huggingface_hub") is None:
        raise CheckpointError(f"Models on the Hub need huggingface_hub. Run `{install_command('hub')}`.")


def _endpoint() -> str | None:
    # The library reads the variable once, when it is imported.
    return os.environ.get("HF_ENDPOINT") or None


def _fetched(repo: str, name: str, revision: str | None, limit: int) -> str:
    """The path of a file in the Hub's cache; it is fetched if it isn't there, and has at most `limit` bytes."""
    import huggingface_hub as hub
    from huggingface_hub.errors import HfHubHTTPError

    if re.fullmatch("[0-9a-f]{40}", revision or ""):
        # A commit doesn't change, so a cached file is right.
        there = hub.try_to_load_from_cache(repo, name, revision=revision)
        if isinstance(there, str):
            return there
    try:
        url = hub.hf_hub_url(repo, name, revision=revision, endpoint=_endpoint())
        size = hub.get_hf_file_metadata(url, library_name="dyconvert", library_version=__version__).size
        if size is None or size > limit:
            raise CheckpointError(f"{name} of {repo} has {size or 0:,} bytes, and at most {limit:,} are read.")
        return hub.hf_hub_download(
            repo,
            name,
            revision=revision,
            endpoint=_endpoint(),
            library_name="dyconvert",
            library_version=__version__,
        )
    except CheckpointError:
        raise
    except Exception as error:
        # If the Hub doesn't answer, a file that was fetched before is used.
        if not isinstance(error, HfHubHTTPError) or getattr(error, "response", None) is None:
            try:
                return hub.hf_hub_download(repo, name, revision=revision, local_files_only=True)
            except Exception:
                pass
        raise CheckpointError(_message(error, repo, revision, "read", name)) from error


def _message(error: Exception, repo: str, revision: str | None, what: str, name: str = "") -> str:
    from huggingface_hub import errors

    at = f" at {revision}" if revision else ""
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} on the Hub is open only to people whom its owner admits. Ask for access on its page."
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"There is no model {repo} on the Hub that may be {what} without more rights. Check the name; for private "
            "ones, log in with `hf auth login`."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} on the Hub has no revision {revision}. Give a branch, a tag or a commit after the @."
    if isinstance(error, errors.EntryNotFoundError) and getattr(error, "response", None) is not None:
        return f"{repo}{at} on the Hub has no {name}: it holds no model that dyconvert saved."
    return (
        f"{repo}{at} on the Hub can't be {what}: {brief(error)}. Check the network, or load a model that was fetched "
        "before."
    )


def _card(api: Any, repo: str, directory: Path) -> str | None:
    """The card to push; None if there is none, or the one on the Hub was edited and this one wasn't."""
    try:
        text = read_text(directory / CARD, CARD_BYTES)
    except (OSError, ValueError):
        return None
    if is_own(text) and api.file_exists(repo, CARD):
        there = Path(_fetched(repo, CARD, None, CARD_BYTES)).read_text(encoding="utf-8", errors="replace")
        if not is_own(there):
            return None
    return at_address(text, f"hf://{repo}")


def _without_folders(text: str | None) -> str | None:
    """A path without its folders, which are this machine's."""
    head, colon, tail = (text or "").rpartition(":")
    if colon and head.endswith(".py"):
        return f"{os.path.basename(head)}:{tail}"
    return os.path.basename(text) if text and ("/" in text or os.sep in text) and ":" not in text else text
