"""What can go wrong, in a few types. Each message says what happened, why, and what to do next.

Below the types: how messages list many things, and how they quote other errors.
"""


class DyconvertError(Exception):
    """Base of every error that dyconvert raises on purpose; the command line turns it into exit code 2."""


class ModelError(DyconvertError):
    """A model can't be found, built, given its weights, or isn't one that can be converted."""


class PlanError(DyconvertError):
    """A plan, or what was asked of one (method, g, patterns), doesn't make sense or doesn't fit the model."""


class ArgumentError(DyconvertError, RuntimeError):
    """The tensors or numbers that a layer is called with don't fit together; a RuntimeError, as torch's own is."""


class CheckpointError(DyconvertError):
    """A saved model can't be written, or can't be read back as it was written."""


class ExportError(DyconvertError):
    """A model can't be exported, or the exported file doesn't compute what the model does."""


class RecipeError(DyconvertError):
    """A recipe has errors, or what it names (data, devices, a run to resume) isn't there or doesn't fit."""


class TrainingError(DyconvertError):
    """Training diverged, or can't go on; the last good checkpoint is kept."""


def some(items: list[str], count: int = 5) -> str:
    """Return the first `count` items, with commas, and how many more there are."""
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return ", ".join(items[:count]) + more


def brief(error: BaseException) -> str:
    """Return the error's type and the first line of what it says, to be quoted in a message of ours."""
    # Before the mark, torch advises to load the file with its code; after the first line comes help.
    lines = str(error).rpartition("WeightsUnpickler error:")[2].strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
