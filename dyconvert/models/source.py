"""Where a model came from, and the forms in which that is recorded."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dyconvert.errors import ModelError

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
    def runs_user_code(self) -> bool:
        """Whether `build` runs code of the user's own, a factory, instead of a library's."""
        return self.specifier.partition(":")[0] not in LIBRARIES

    def to_json(self) -> dict[str, Any]:
        """Return a dict that `json` can write.

        Raises:
            ModelError: an argument isn't plain data (a class, say), so it can't be saved.
        """
        for name, value in self.arguments.items():
            try:
                json.dumps(value)
            except (TypeError, ValueError) as error:
                raise ModelError(
                    f"The argument {name}={value!r} of {self.specifier} can't be saved: {error}. Put it into a "
                    "factory of your own (`file.py:factory`), or use numbers, strings and lists of them."
                ) from error
        return {
            "specifier": self.specifier,
            "arguments": dict(self.arguments),
            "weights": self.weights,
            "input_size": self.input_size and list(self.input_size),
            **({"num_classes": self.num_classes} if self.num_classes is not None else {}),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Source":
        """Return the source that `to_json` made `data` of."""
        arguments = {name: as_tuples(value) for name, value in data["arguments"].items()}
        return cls(
            data["specifier"], arguments, data["weights"], as_tuples(data["input_size"]), data.get("num_classes")
        )


def as_tuples(value: Any) -> Any:
    """Return `value` with its lists, at any depth, as tuples; JSON turns tuples into lists."""
    return tuple(as_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def absolute(path: str) -> Path:
    """Return the path as it is meant from any folder, with `~` expanded."""
    return Path(os.path.abspath(os.path.expanduser(path)))


def names_file(weights: str) -> bool:
    """Whether `weights` is meant as a path, be the file there or not."""
    if weights in ("default", "none"):
        return False
    is_path = any(separator in weights for separator in (os.sep, os.altsep or os.sep))
    return is_path or is_weights_name(weights) or os.path.isfile(weights)


def is_weights_name(name: str) -> bool:
    """Whether a file of this name would hold weights."""
    return Path(name).suffix in _WEIGHTS_SUFFIXES
