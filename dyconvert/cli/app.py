"""The application: its commands, the short form of `convert`, and how errors end."""

import difflib
import os
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from dyconvert.cli import (
    bench,
    collapse,
    common,
    completing,
    convert,
    export,
    finetune,
    inspect,
    ls,
    methods,
    predict,
    push,
    recipes,
    report,
)
from dyconvert.cli.common import with_common
from dyconvert.console import fail
from dyconvert.errors import DyconvertError, ModelError

_SETTINGS = {"help_option_names": ["-h", "--help"]}


# Three of each: the plain one, a common one, and one that shows what else there is.
EXAMPLES = {
    "convert": (
        "dyconvert resnet50 --g 6",
        "dyconvert model.py:net --weights net.pth --input-size 3,32,32 -m condconv",
        "dyconvert resnet50 --width 0.5 --data images/ -o narrow",
    ),
    "finetune": (
        "dyconvert finetune quickstart",
        "dyconvert finetune cifar10-resnet20 data.root=cifar10 train.epochs=5 --dry-run",
        "dyconvert finetune mine.yaml --resume",
    ),
    "collapse": (
        "dyconvert collapse resnet50-dynet-g6 -o static.safetensors",
        "dyconvert collapse runs/mine -o static.pth --data images/val",
        "dyconvert resnet50 --weights static.safetensors",
    ),
    "export": (
        "dyconvert export resnet50-dynet-g6",
        "dyconvert export runs/mine --batch 1 --fp16 -o mine.onnx",
        "dyconvert export runs/mine --to openvino --dynamic-size",
    ),
    "predict": (
        "dyconvert predict runs/mine cat.jpg",
        "dyconvert predict runs/mine images/ --top 3",
        "dyconvert predict runs/mine cat.jpg dog.jpg --json",
    ),
    "push": (
        "dyconvert push resnet50-dynet-g6 user/resnet50-dynet",
        "dyconvert push runs/mine user/mine",
        "dyconvert push runs/mine/ema user/mine --json",
    ),
    "inspect": (
        "dyconvert inspect resnet50-dynet-g6",
        "dyconvert inspect runs/mine --data images/val",
        "dyconvert inspect runs/mine --json",
    ),
    "report": (
        "dyconvert report runs/mine --data images/val",
        "dyconvert report runs/mine --data images/val --against resnet50 -o report",
        "dyconvert report resnet50-dynet-g6 --sizes none",
    ),
    "ls": ("dyconvert ls", "dyconvert ls mobilenet", "dyconvert ls 'resnet*' --source timm"),
}


class Command(TyperCommand):
    """A command whose --help stands with what every command takes."""

    def get_help_option(self, ctx: Any) -> Any:
        option = super().get_help_option(ctx)
        if option is not None:
            option.rich_help_panel = common.PANEL
        return option


class Commands(TyperGroup):
    """The commands. What isn't one is taken for a model, to be converted."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        args = self._with_command(ctx, args)
        return super().parse_args(ctx, args)

    def _with_command(self, ctx: Any, args: list[str]) -> list[str]:
        # -q and -v may stand before the command too.
        flags = next((n for n, each in enumerate(args) if each not in common.FLAGS), len(args))
        first, rest = args[flags:][:1], args[flags + 1 :]
        if not first:
            return args
        if first[0] in self.commands:
            return [*first, *args[:flags], *rest]
        if any(first[0] in param.opts for param in self.get_params(ctx)):
            return args[flags:]
        if not ctx.resilient_parsing:
            _check_model(first[0], list(self.commands))
        return ["convert", *args]

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        command = self.commands["convert"]
        inner = command.make_context("convert", [], parent=ctx, resilient_parsing=True)
        model = next(param for param in command.get_params(inner) if param.name == "model")
        return [*super().shell_complete(ctx, incomplete), *model.shell_complete(inner, incomplete)]


def _check_model(word: str, commands: list[str]) -> None:
    """Refuse a word that is no model's name, but nearly a command's.

    Raises:
        ModelError: see above.
    """
    if not word.isidentifier() or os.path.exists(word):
        return
    near = difflib.get_close_matches(word.lower(), commands, n=1, cutoff=0.7)
    if near:
        from dyconvert.models import list_models

        if word not in {name for names in list_models().values() for name in names}:
            raise ModelError(f"There is no command {word!r}. Did you mean `dyconvert {near[0]}`?")


app = typer.Typer(
    cls=Commands,
    name="dyconvert",
    help="Turn a pretrained CNN into a dynamic-convolution network that still computes the same outputs.\n\n"
    "`dyconvert MODEL` is short for `dyconvert convert MODEL`.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings=_SETTINGS,
)


def _version(value: bool) -> None:
    if value:
        import importlib.metadata

        from dyconvert import __version__

        try:
            torch = f"torch {importlib.metadata.version('torch')}"
        except importlib.metadata.PackageNotFoundError:
            torch = "without torch"
        typer.echo(f"dyconvert {__version__} ({torch})")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


_CONVERTING, _LOOKING, _LISTING = "Convert and train", "Look and measure", "Names"
for function, panel, how in (
    (convert.convert, _CONVERTING, {"silent": True, "device": True}),
    (finetune.finetune, _CONVERTING, {"silent": True, "device": True}),
    (collapse.collapse, _CONVERTING, {"silent": True, "device": True}),
    (export.export, _CONVERTING, {"silent": True, "device": True}),
    (push.push, _CONVERTING, {"silent": True}),
    (predict.predict, _LOOKING, {"device": True}),
    (inspect.inspect, _LOOKING, {"device": True}),
    (report.report, _LOOKING, {"silent": True, "device": True}),
    (ls.ls, _LISTING, {}),
    (methods.methods, _LISTING, {}),
):
    name = function.__name__
    epilog = "\n\n".join(["Examples:", *EXAMPLES[name]]) if name in EXAMPLES else None
    app.command(name, cls=Command, rich_help_panel=panel, epilog=epilog)(with_common(function, **how))
app.add_typer(bench.app, name="bench", rich_help_panel=_LOOKING)
app.add_typer(recipes.app, name="recipes", rich_help_panel=_LISTING)


def run(arguments: list[str]) -> int:
    """Run a command, and return its exit code."""
    try:
        with completing.words_with_colons():
            return app(args=arguments, prog_name="dyconvert", standalone_mode=False) or 0
    except DyconvertError as error:
        return _failed(str(error))
    except BrokenPipeError:
        raise
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _failed(f"{where}{error.strerror or error}. Check the path, the space and the permissions there.")
    except Exception as problem:
        # typer's own errors about the typed command; their types are not public.
        typed: Any = problem
        if not hasattr(typed, "format_message"):
            raise
        if type(typed).__name__ == "NoArgsIsHelpError":
            typed.show()
            return 2
        command = getattr(typed.ctx, "command_path", "dyconvert") if getattr(typed, "ctx", None) else "dyconvert"
        return _failed(f"{typed.format_message().rstrip('.')}.\nAll options: {command} --help")


def _failed(message: str) -> int:
    if common.verbose:
        traceback.print_exc()
    fail(message)
    return 2
