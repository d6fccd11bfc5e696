"""Messages of the library in the words of a command: what Python calls `force=True` is --force here."""

import inspect

from dyconvert.errors import reworded

# Arguments that aren't options of the same name: the option, and what the user types.
_OTHER_NAMES = {
    "arguments": ("model_arg", "--model-arg num_classes=10"),
    "directory": ("output", "--output"),
    "dynamic_batch": ("batch", "--batch N"),
    "example": ("input_size", "--input-size 3,224,224"),
    "model": ("factory", "--model FILE.py:FACTORY"),
}


def in_options(message: str, command: inspect.Signature) -> str:
    """The message with arguments written as one types them; without advice to use what the command doesn't have."""

    def option(name: str) -> str | None:
        parameter, typed = _OTHER_NAMES.get(name, (name, f"--{name.replace('_', '-')}"))
        if parameter in command.parameters:
            return typed
        return f"--{name.replace('_', '-')}" if name in command.parameters else None

    return reworded(message, option)
