"""The command line: one file a command, each thin: parse, call the API, print."""

import os
import sys

from dyconvert.cli.app import app, command_names
from dyconvert.console import fail
from dyconvert.errors import DyconvertError


def main() -> None:
    """`dyconvert resnet50 --g 6` is `dyconvert convert resnet50 --g 6`; errors end with exit code 2."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] not in command_names() | {"--help", "-h", "--version"}:
        arguments = ["convert", *arguments]
    try:
        app(args=arguments, prog_name="dyconvert")
    except DyconvertError as error:
        fail(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        fail("Stopped. Nothing half-written was left.")
        sys.exit(130)
    except BrokenPipeError:
        # The reader (head, less) has gone: nothing more to say, and nowhere to say it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
