"""Where a model came from, and the forms in which that is recorded."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dyconvert.errors import ModelError
from dyconvert.limits import INPUT_SIDE
from dyconvert.models.limited import untrusted

# The sources that list their models by name. Every other specifier names a factory, code of the user's own.
LIBRARIES = ("torchvision", "timm", "builtin")
_WEIGHTS_SUFFIXES = {".pth", ".pt", ".th", ".ckpt", ".safetensors", ".bin"}


@dataclass(frozen=True)
class Source:
    """Where a model came from: enough for `build` to make its architecture again.

    Attributes:
        specifier: in full, such as "torchvision:resnet50"; the path of a Python file is absolute.
        arguments: those of the model's builder.
        weights: name of the weight set, absolute path of the weights file, or None if there is neither.
        input_size: (C, H, W) in pixels, (C, T, H, W) in pixels and frames for video, None if unknown.
        num_classes: of the head that replaced the model's own; None where it kept that.
    """

    specifier: str
    arguments: dict[str, Any]
    weights: str | None
    input_size: tuple[int, ...] | None
    num_classes: int | None = None

    @property
    def needs_trust(self) -> bool:
        """Whether `load` builds it only where it is told to trust the file."""
        return self.runs_user_code or untrusted(self) is not None

    @property
    def runs_user_code(self) -> bool:
        """Whether `build` runs code of the user's own, a factory, instead of a library's."""
        return self.specifier.partition(":")[0] not in LIBRARIES

    def to_json(self, directory: str | os.PathLike[str] | None = None) -> dict[str, Any]:
        """Return a dict that `json` can write.

        Args:
            directory: the directory that it is written to. Paths are relative to it if both are below one folder, so
                that they may be moved and copied together; "absolute" has them as they are.

        Raises:
            ModelError: an argument isn't plain data (a class, say), so it can't be saved.
        """
        for name, value in self.arguments.items():
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError, RecursionError) as error:
                raise ModelError(
                    f"The argument {name}={value!r} of {self.specifier} can't be saved: {error}. Put it into a "
                    "factory of your own (`file.py:factory`), or use numbers, strings and lists of them."
                ) from error
        paths = {"specifier": self.specifier, "weights": self.weights}
        near = paths if directory is None else {key: _relative(value, directory) for key, value in paths.items()}
        return {
            "specifier": near["specifier"],
            "arguments": dict(self.arguments),
            "weights": near["weights"],
            "input_size": self.input_size and list(self.input_size),
            **({"num_classes": self.num_classes} if self.num_classes is not None else {}),
            **({"absolute": paths} if near != paths else {}),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], directory: str | os.PathLike[str] | None = None) -> "Source":
        """Return the source that `to_json` made `data` of.

        Raises:
            KeyError, TypeError, ValueError: it made nothing like that.
        """
        arguments = {name: as_tuples(value) for name, value in data["arguments"].items()}
        found = {"specifier": data["specifier"], "weights": data["weights"]}
        size, classes = as_tuples(data["input_size"]), data.get("num_classes")
        if not isinstance(found["specifier"], str) or not isinstance(found["weights"], str | None):
            raise TypeError("its specifier or weights are no text")
        if size is not None and not (
            isinstance(size, tuple) and len(size) <= 4 and all(type(n) is int and 0 < n <= INPUT_SIDE for n in size)
        ):
            raise ValueError(f"its input_size is {size!r}")
        if type(classes) not in (int, type(None)):
            raise TypeError("its num_classes is no number")
        if directory is not None:
            others = data.get("absolute") or {}
            found = {key: _resolved(value, others.get(key), directory) for key, value in found.items()}
        return cls(found["specifier"], arguments, found["weights"], size, classes)


def _relative(text: str | None, directory: str | os.PathLike[str]) -> str | None:
    """A path, or a specifier that begins with the path of a Python file, as it is seen from `directory`."""
    path, suffix = _path_in(text)
    if path is None or not os.path.isabs(path):
        return text
    path, folder = (os.path.realpath(each) for each in (path, directory))
    try:
        shared = os.path.commonpath([path, folder])
    except ValueError:  # on two drives
        return text
    return text if os.path.dirname(shared) == shared else os.path.relpath(path, folder).replace(os.sep, "/") + suffix


def _resolved(text: str | None, other: Any, directory: str | os.PathLike[str]) -> str | None:
    path, suffix = _path_in(text)
    if path is None or os.path.isabs(path):
        return text
    near = os.path.normpath(os.path.join(os.path.realpath(directory), path))
    if not os.path.isfile(near) and isinstance(other, str) and os.path.isfile(_path_in(other)[0] or ""):
        return other
    return near + suffix


def _path_in(text: str | None) -> tuple[str | None, str]:
    """The path of a Python or a weights file in a text, and the text after it; None: there is none."""
    if text is None:
        return None, ""
    head, colon, tail = text.rpartition(":")
    if colon and head.endswith(".py"):
        return head, colon + tail
    is_path = "/" in text or os.sep in text
    return (text, "") if (is_path and not colon) or os.path.isabs(text) else (None, "")


def as_tuples(value: Any) -> Any:
    """Return `value` with its lists, at any depth, as tuples; JSON turns tuples into lists."""
    return tuple(as_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def absolute(path: str) -> Path:
    """Return the path as it is meant from any folder, with `~` expanded.

    Raises:
        ModelError: it is no path, or relative to a current folder that was deleted.
    """
    try:
        return Path(os.path.abspath(os.path.expanduser(path)))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path!r} can't be used as a path: {error}. Give an absolute one.") from None


def names_file(weights: str) -> bool:
    """Whether `weights` is meant as a path, be the file there or not."""
    if weights in ("default", "none"):
        return False
    # A bare name is a weight set's, whatever lies in the current folder; a file is named as one, such as ./best.
    return any(separator in weights for separator in (os.sep, os.altsep or os.sep)) or is_weights_name(weights)


def is_weights_name(name: str) -> bool:
    """Whether a file of this name would hold weights."""
    return Path(name).suffix in _WEIGHTS_SUFFIXES
