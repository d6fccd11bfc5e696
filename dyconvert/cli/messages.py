"""Messages of the library in the words of a command: what Python calls `force=True` is --force here."""

import inspect
import re

# The library writes arguments in backticks; those of a recipe, such as train.lr=0.01, are the same everywhere.
_ARGUMENT = re.compile(r"`(\w+)=([^`]*)`")
# Where an argument isn't an option of the same name: the option, and what is typed.
_OTHER_NAMES = {
    "arguments": ("model_arg", "--model-arg num_classes=10"),
    "directory": ("output", "--output"),
    "dynamic_batch": ("batch", "--batch N"),
    "example": ("input_size", "--input-size 3,224,224"),
    "model": ("factory", "--model FILE.py:FACTORY"),
}


def in_options(message: str, command: inspect.Signature) -> str:
    """The message with the arguments that are options of the command written as one types them."""
    return _ARGUMENT.sub(lambda found: _option(found, command), message)


def _option(found: re.Match[str], command: inspect.Signature) -> str:
    name, value = found[1], found[2].strip("'\"")
    if name in _OTHER_NAMES and _OTHER_NAMES[name][0] in command.parameters:
        return _OTHER_NAMES[name][1]
    if name not in command.parameters:
        return found[0]
    option = f"--{name.replace('_', '-')}"
    return option if value in ("True", "...", "[...]") else f"{option} {value}"
