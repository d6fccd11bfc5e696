"""Tab completion of names, without importing the libraries that have them."""

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator


def models(incomplete: str) -> list[str]:
    """Models: torchvision's and ours by their names, those of a library after its name and a colon."""
    from dyconvert.models.listing import list_models
    from dyconvert.models.source import LIBRARIES

    library, colon, start = incomplete.partition(":")
    listed = list_models()
    if not colon:
        names = [name for source in ("torchvision", "builtin") for name in listed[source]]
        names += [f"{each}:" for each in LIBRARIES if each in listed]
        return [name for name in names if name.startswith(incomplete)]
    return [f"{library}:{name}" for name in listed.get(library, []) if name.startswith(start)]


def methods(incomplete: str) -> list[str]:
    from dyconvert.methods import METHODS

    return [name for name in METHODS if name.startswith(incomplete)]


def recipes(incomplete: str) -> list[str]:
    from dyconvert.finetuning.recipes.shipped import shipped_recipes

    return [name for name in shipped_recipes() if name.startswith(incomplete)]


def sweeps(incomplete: str) -> list[str]:
    from dyconvert.finetuning.recipes.shipped import shipped_sweeps

    return [name for name in shipped_sweeps() if name.startswith(incomplete)]


def recipes_and_sweeps(incomplete: str) -> list[str]:
    return recipes(incomplete) + sweeps(incomplete)


@contextlib.contextmanager
def words_with_colons() -> Iterator[None]:
    """Within this, bash's words are those that were typed. It splits them at colons: `timm : resn` is `timm:resn`.

    It takes what is printed for what follows the last colon, so what stands before that isn't printed.
    """
    words, at = os.environ.get("COMP_WORDS"), os.environ.get("COMP_CWORD", "")
    in_bash = os.environ.get("_DYCONVERT_COMPLETE", "").endswith("complete_bash")
    if not in_bash or words is None or not at.isdigit():
        yield
        return
    joined: list[str] = []
    index = 0
    for number, word in enumerate(re.split(r"\s", words)):
        if joined and (word == ":" or joined[-1].endswith(":")):
            joined[-1] += word
        else:
            joined.append(word)
        if number == int(at):
            index = len(joined) - 1
    os.environ["COMP_WORDS"], os.environ["COMP_CWORD"] = " ".join(joined), str(index)
    before = "".join(joined[index].rpartition(":")[:2]) if index < len(joined) else ""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        sys.stdout.write("".join(line.removeprefix(before) for line in printed.getvalue().splitlines(keepends=True)))
