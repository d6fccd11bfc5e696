"""dyconvert push"""

from pathlib import Path
from typing import Annotated

import typer

from dyconvert.cli.options import Json
from dyconvert.cli.progress import progress
from dyconvert.console import out, write_json


def push(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A model saved by dyconvert, or a run's directory.")],
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="The repository on the Hugging Face Hub.")],
    as_json: Json = False,
) -> None:
    """Put a saved model onto the Hugging Face Hub: its weights, its description and its card, in one commit.

    Log in before, with `hf auth login`. A repository that doesn't exist is made, and is public.
    """
    from dyconvert.checkpoint import push as push_saved

    with progress(f"sending {directory}"):
        address = push_saved(directory, repo)
    if as_json:
        write_json({"address": address})
    else:
        out.print(f"pushed to {address}", soft_wrap=True)
