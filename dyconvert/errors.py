"""The exception types. Each message says what happened, why, and what to do next.

Below the types: how messages list many things, how they quote other errors, and how they name arguments.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping

from dyconvert.torch_internals.messages import without_advice

# The library writes arguments of its functions in backticks; those of a recipe, such as train.lr=0.01, are the same
# everywhere.
_ARGUMENT = re.compile(r"`(\w+)=([^`]*)`")
# Where the next sentence begins, in the same line.
_NEXT = re.compile(r"(?<=[.!?]) (?=[A-Z`])")


class DyconvertError(Exception):
    """Base of every error that dyconvert raises on purpose; the command line turns it into exit code 2."""


class ModelError(DyconvertError):
    """A model can't be found, built, given its weights, or isn't one that can be converted."""


class PlanError(DyconvertError):
    """A plan, or one of its options (method, g, patterns), makes no sense or doesn't fit the model."""


class ArgumentError(DyconvertError, RuntimeError):
    """The tensors or numbers that a layer is called with don't fit together; a RuntimeError, as torch's own is."""


class CheckpointError(DyconvertError):
    """A saved model can't be written, or can't be read back as it was written."""


class ExportError(DyconvertError):
    """A model can't be exported, or the exported file doesn't compute what the model does."""


class RecipeError(DyconvertError):
    """A recipe has errors, or names something (data, devices, a run to resume) that isn't there or doesn't fit."""


class TrainingError(DyconvertError):
    """Training diverged, or can't go on; the last good checkpoint is kept."""


def some(items: list[str], count: int = 5) -> str:
    """Return the first `count` items, with commas, and how many more there are."""
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return ", ".join(items[:count]) + more


def brief(error: BaseException) -> str:
    """Return the error's type and the first line of its message, to be quoted in a message of ours."""
    # After the first line comes help.
    lines = without_advice(str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__


def reworded(message: str, word: Callable[[str], str | None]) -> str:
    """Return the message with the arguments that it names in other words.

    Args:
        word: what an argument is called where the user gives it. None: it can't be given there, so that a sentence
            which advises it is left out.
    """
    return "\n".join(_line(line, word) for line in message.split("\n"))


@contextlib.contextmanager
def said_as(words: Mapping[str, str | None]) -> Iterator[None]:
    """Name the arguments in `words` by these in the errors of the block; None as for `reworded`, others as they are."""
    try:
        yield
    except DyconvertError as error:
        text = reworded(str(error), lambda name: words.get(name, ""))
        error.args = (text, *error.args[1:])
        raise


def _line(line: str, word: Callable[[str], str | None]) -> str:
    return " ".join(
        _ARGUMENT.sub(lambda match: _worded(match, word), sentence)
        for sentence in _NEXT.split(line)
        if all(word(match[1]) is not None for match in _ARGUMENT.finditer(sentence))
    )


def _worded(match: re.Match[str], word: Callable[[str], str | None]) -> str:
    name, value = word(match[1]), match[2].strip("'\"")
    if not name:
        return match[0]
    if " " in name or value in ("True", "...", "[...]"):
        return name
    return f"{name} {value}" if name.startswith("--") else f"{name}={value}"
