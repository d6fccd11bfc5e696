"""The command line: one file a command, each thin: parse, call the API, print.

Every command's options are declared without torch, and each command imports what it needs when it runs: help, lists and
errors in what was typed come at once.
"""

import os
import sys

from dyconvert.cli import interrupts


def main() -> None:
    """Run the command in `sys.argv`: errors end with exit code 2, Ctrl-C with 130."""
    with interrupts.TakenOver():
        code = _code()
    sys.exit(code)


def _code() -> int:
    try:
        code = _run()
        sys.stdout.flush()
        return _stopped() if code == interrupts.CODE else code
    except KeyboardInterrupt:
        return _stopped()
    except BrokenPipeError:
        # The reader (head, less) has gone: nothing more to say, and nowhere to say it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except BaseException:
        if not interrupts.seen():
            raise
        return _stopped()


def _run() -> int:
    from dyconvert.cli.app import run

    return run(sys.argv[1:])


def _stopped() -> int:
    from dyconvert.console import fail

    fail(interrupts.MESSAGE)
    return interrupts.CODE
