"""dyconvert ls"""

import fnmatch
from typing import Annotated

import typer
from rich.text import Text

from dyconvert.cli.options import Json
from dyconvert.console import in_columns, out, write_json
from dyconvert.errors import ModelError
from dyconvert.installation import install_command


def ls(
    pattern: Annotated[str, typer.Argument(help="Names to list: a word in them, or a pattern like 'resnet*'.")] = "*",
    source: Annotated[str | None, typer.Option(help="torchvision, timm or builtin; all of them by default.")] = None,
    as_json: Json = False,
) -> None:
    """List the models that can be named, by source."""
    from dyconvert import models

    glob = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    listed = {
        name: [m for m in names if fnmatch.fnmatchcase(m, glob)] for name, names in models.list_models(source).items()
    }
    if not any(listed.values()):
        raise ModelError(f"No model's name matches {pattern!r}. `dyconvert ls` lists them all.")
    if as_json:
        write_json(listed)
        return
    for name, names in listed.items():
        if names:
            out.print(Text(f"{name}: ({len(names)})", style="bold"))
            out.print(in_columns(names, out.width), soft_wrap=True)
    if source is None:
        if "timm" not in listed:
            out.print(f"\ntimm isn't installed; over a thousand more models: {install_command('timm')}", soft_wrap=True)
        out.print("\nYour own: package.module:factory, or path/to/file.py:factory.")
