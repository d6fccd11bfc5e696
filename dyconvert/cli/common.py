"""The options of every command: -q, -v and, if a model runs, --device."""

import functools
import inspect
import logging
import re
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any, cast

import typer

from dyconvert import console
from dyconvert.cli.messages import in_options
from dyconvert.errors import DyconvertError, ModelError

PANEL = "General"

Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Print errors, and results that were asked for.", rich_help_panel=PANEL),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose", "-v", help="Print libraries' warnings, and where an error is from.", rich_help_panel=PANEL
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="Where the model runs: cpu, cuda, cuda:1, mps; by default the CPU.",
        rich_help_panel=PANEL,
        autocompletion=lambda: ["cpu", "cuda", "mps"],
    ),
]
FLAGS = ("-q", "--quiet", "-v", "--verbose")

# Whether the running command is to print where its error comes from.
verbose = False


def with_common(function: Callable[..., None], *, silent: bool = False, device: bool = False) -> Callable[..., None]:
    """The command, with the options of all commands.

    Args:
        function: the command. Its errors are put into words of its own options.
        silent: -q prints no results either, for a command that is called for what it writes.
        device: it takes --device, as its argument `device`.
    """
    own = inspect.signature(function)
    extra = {"quiet": Quiet, "verbose": Verbose}
    parameters = [p for p in own.parameters.values() if p.name != "device"]
    if device:
        parameters.append(_parameter("device", Device, None))
    parameters += [_parameter(name, annotation, False) for name, annotation in extra.items()]

    @functools.wraps(function)
    def command(*, quiet: bool = False, verbose: bool = False, **options: Any) -> None:
        said = console.err.quiet, console.out.quiet
        _speak(quiet, verbose, silent)
        try:
            function(**options)
        except DyconvertError as error:
            error.args = (in_options(str(error), own), *error.args[1:])
            raise
        finally:
            console.err.quiet, console.out.quiet = said

    command.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def parse_device(text: str | None) -> Any:
    """The torch device that `--device` names; the CPU where it names none.

    Raises:
        ModelError: there is no such device, or this machine hasn't it.
    """
    import torch

    text = text or "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", text):
        raise ModelError(f"There is no device {text!r}. Write --device cpu, cuda, cuda:1 or mps.")
    device = torch.device(text)
    if device.type == "cuda":
        devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= devices:
            there = f"has {devices} of them" if devices else "has none that this torch can use"
            raise ModelError(f"--device {text}: this machine {there}. Choose another, or leave it out for the CPU.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ModelError("--device mps: this machine has no Metal GPU. Leave it out for the CPU.")
    return device


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _speak(quiet: bool, loud: bool, silent: bool) -> None:
    """Say as much as was asked for."""
    global verbose
    verbose = loud
    console.err.quiet = quiet
    console.out.quiet = quiet and silent
    if loud:
        return
    # A library's warnings about its own insides are nothing that a user of ours can act on.
    warnings.showwarning = cast(Any, _show_warning)
    logging.captureWarnings(False)
    for name in ("lightning", "torch", "torch.onnx", "onnxscript", "onnx_ir", "timm", "huggingface_hub", "matplotlib"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _show_warning(message: Warning | str, category: type[Warning], filename: str, *_: Any) -> None:
    """Print a warning of ours or of the user's own code, or one that says what doesn't work on this machine."""
    of_library = f"{_sep()}site-packages{_sep()}" in filename and f"{_sep()}dyconvert{_sep()}" not in filename
    if issubclass(category, DeprecationWarning | PendingDeprecationWarning | FutureWarning):
        return
    if not of_library or re.search(r"CUDA|driver|No space|corrupt", str(message)):
        console.warn(str(message))


def _sep() -> str:
    return "\\" if sys.platform == "win32" else "/"
