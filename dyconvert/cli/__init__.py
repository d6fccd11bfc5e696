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
    if code:
        _forget_unwritten()
    sys.exit(code)


def _code() -> int:
    try:
        code = _run()
        code = code or _flushed()
        return _stopped() if code == interrupts.CODE else code
    except KeyboardInterrupt:
        return _stopped()
    except BrokenPipeError:
        # The reader (head, less) has gone: nothing more to say, and nowhere to say it.
        return 1
    except BaseException:
        if not interrupts.seen():
            raise
        return _stopped()


def _flushed() -> int:
    """Write the rest of stdout; 0, or the exit code of an error, such as a full disk."""
    try:
        sys.stdout.flush()
        return 0
    except BrokenPipeError:
        raise
    except OSError as error:
        from dyconvert.console import fail

        fail(f"The output can't be written: {error.strerror}. Free some space, or send it to another place.")
        return 2


def _forget_unwritten() -> None:
    """Discard output that can't be written: Python would try again at the end, and print a traceback."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run() -> int:
    from dyconvert.cli.app import run

    return run(sys.argv[1:])


def _stopped() -> int:
    from dyconvert.console import fail

    fail(interrupts.MESSAGE)
    return interrupts.CODE
