"""The application, and its commands."""

from typing import Annotated

import typer

from dyconvert.cli import bench, collapse, convert, export, finetune, inspect, ls, methods, recipes, report

app = typer.Typer(
    name="dyconvert",
    help="Turn a pretrained CNN into a dynamic-convolution network that still computes the same outputs.\n\n"
    "`dyconvert MODEL` is short for `dyconvert convert MODEL`.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        import torch

        from dyconvert import __version__

        typer.echo(f"dyconvert {__version__} (torch {torch.__version__})")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


app.command("convert")(convert.convert)
app.add_typer(bench.app, name="bench")
app.command("collapse")(collapse.collapse)
app.command("export")(export.export)
app.command("finetune")(finetune.finetune)
app.command("inspect")(inspect.inspect)
app.command("ls")(ls.ls)
app.command("methods")(methods.methods)
app.add_typer(recipes.app, name="recipes")
app.command("report")(report.report)


def command_names() -> set[str]:
    commands = {command.name for command in app.registered_commands}
    return {name for name in commands | {group.name for group in app.registered_groups} if name}
