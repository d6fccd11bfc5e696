"""Calls model builders, and makes the errors for failed builds and unknown names."""

import contextlib
import difflib
import sys
from collections.abc import Callable, Mapping
from http.client import HTTPException
from typing import Any

from torch import nn

from dyconvert.errors import ModelError, brief
from dyconvert.models.bounded import TooLargeError

_OTHER_WEIGHTS = "Give a file with `weights=FILE`, or ask for random weights with `weights='none'`."


def call(
    specifier: str, builder: Callable[..., Any], arguments: Mapping[str, Any], url: str | None = None, **ours: Any
) -> nn.Module:
    """Call a builder, which may download from `url`, with the user's arguments and ours."""
    try:
        # torch.hub announces downloads on stdout, which is for a command's output.
        with contextlib.redirect_stdout(sys.stderr):
            model = builder(**ours, **arguments)
    except TooLargeError as error:
        raise TooLargeError(f"{specifier} is refused: {error}. Was the file edited? Check its arguments.") from None
    except ModelError:
        raise
    except Exception as error:
        cause = brief(error)
        if url and _is_download_error(error):
            raise ModelError(
                f"The weights of {specifier} can't be downloaded from {url}: {cause}. {_OTHER_WEIGHTS}"
            ) from error
        described = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        raise ModelError(
            f"{specifier} can't be built with {described or 'no arguments'}: {cause}. Check its arguments."
        ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{specifier} returns a {type(model).__name__}; name one that returns a torch.nn.Module.")
    return model


def unknown_weights(specifier: str, weights: str, known: list[str]) -> ModelError:
    """Return the error for a weight set that isn't one of `known`, with the nearest of them."""
    if not known:
        return ModelError(f"The library has no pretrained weights for {specifier}. {_OTHER_WEIGHTS}")
    near = ", ".join(difflib.get_close_matches(weights, known) or known)
    return ModelError(f"{specifier} has no pretrained weights {weights!r}, but {near}. {_OTHER_WEIGHTS}")


def _is_download_error(error: Exception) -> bool:
    # Errors of urllib and sockets are OSErrors; those of the Hugging Face client's HTTP library need not be.
    library = type(error).__module__.partition(".")[0]
    return (
        isinstance(error, OSError | HTTPException)
        or library in ("huggingface_hub", "httpx", "httpcore", "requests", "urllib3")
        or "invalid hash value" in str(error)
    )
