"""dyconvert ls"""

import fnmatch
import json
from typing import Annotated

import typer
from rich.columns import Columns
from rich.text import Text

from dyconvert import models
from dyconvert.console import out
from dyconvert.errors import ModelError


def ls(
    pattern: Annotated[str, typer.Argument(help="Names to list: a word in them, or a pattern like 'resnet*'.")] = "*",
    source: Annotated[str | None, typer.Option(help="torchvision, timm or builtin; all of them by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the models that can be named, by source."""
    glob = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    listed = {
        name: [m for m in found if fnmatch.fnmatchcase(m, glob)] for name, found in models.list_models(source).items()
    }
    if not any(listed.values()):
        raise ModelError(f"No model's name matches {pattern!r}. `dyconvert ls` lists them all.")
    if as_json:
        typer.echo(json.dumps(listed, indent=2))
        return
    for name, found in listed.items():
        if found:
            out.print(Text(f"{name}: ({len(found)})", style="bold"))
            out.print(Columns(found, padding=(0, 2), column_first=True))
    if source is None:
        if "timm" not in listed:
            out.print("\ntimm isn't installed: pip install 'dyconvert[timm]' adds over a thousand models.")
        out.print("\nYour own: package.module:factory, or path/to/file.py:factory.")
