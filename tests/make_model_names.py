"""Writes `dyconvert/models/names.json`: the names of the models of the installed torchvision, timm and dyconvert."""

import json

from dyconvert.models.listing import SHIPPED, names_of, version_of
from dyconvert.models.source import LIBRARIES


def names() -> dict[str, dict[str, object]]:
    """The contents of the file."""
    return {
        library: {"version": None if library == "builtin" else version_of(library), "names": names_of(library)}
        for library in LIBRARIES
    }


if __name__ == "__main__":
    SHIPPED.write_text(json.dumps(names(), indent=0) + "\n", encoding="utf-8")
