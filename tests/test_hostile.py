"""Nothing that is opened runs, hangs, fills the memory, leaves half a file or prints a traceback.

`pytest -m sweep tests/test_hostile.py -n 2` tries 2,400 generated cases; the default run 200 of them, of another seed.
"""

import contextlib
import json
import os
import re
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hostile_inputs import cases
from hostile_values import MARK, Case
from nets import listed

import dyconvert
from dyconvert import DyconvertError, models

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")

# A process that computes for ten seconds hangs. It gets half as many more, for it may share its core, whose seconds are
# shorter then; and the clock more still, for the machine may be busy with others.
CPU_SECONDS, CLOCK_SECONDS = 15, 240
# Beyond what the good case takes.
MEMORY = 2**30
_OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]+")


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A folder with a small saved model."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("good")
    static, source = models.create("builtin:digits-resnet8", "none", {"width": 2})
    dyconvert.save(dyconvert.convert(static, g=2), folder / "saved", source=source)
    return folder


@pytest.fixture(scope="module", autouse=True)
def _imported() -> Iterator[None]:
    """What the commands import lazily is imported before the forks."""
    import huggingface_hub
    import matplotlib.pyplot  # noqa: F401
    import timm  # noqa: F401

    import dyconvert.cli.app
    import dyconvert.cli.opening
    import dyconvert.exporting.export
    import dyconvert.finetuning.dry_run
    import dyconvert.finetuning.run
    import dyconvert.finetuning.sweeps.runner
    import dyconvert.report.page  # noqa: F401

    with pytest.MonkeyPatch.context() as patch:
        # What asks the Hub would be taken for code that connects to somewhere.
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield


def attempt(case: Case) -> dict[str, object]:
    """Do what the case says, in this process; how it ended, in words."""
    if case.call is not None:
        try:
            case.call()
        except DyconvertError as error:
            return {"ended": "refused", "said": str(error)}
        except BaseException:
            return {"ended": "crashed", "said": traceback.format_exc()}
        return {"ended": "done", "said": ""}
    from dyconvert.cli import main

    sys.argv = ["dyconvert", *case.argv]
    code: object = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    said = Path("said.txt").read_text(encoding="utf-8", errors="replace")
    crashed = "Traceback (most recent" in said or code not in (0, 2)
    return {"ended": "crashed" if crashed else "done" if code == 0 else "refused", "said": said[-3000:]}


def child(case: Case, pipe: int) -> None:
    """What the forked process does; it doesn't return."""
    result: dict[str, object]
    with contextlib.suppress(ValueError):
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    ran: list[str] = []

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        watched = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect", "socket.getaddrinfo")
        if event in watched:
            ran.append(f"{event} {str(arguments)[:200]}")

    out = os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    sys.addaudithook(watch)
    result = attempt(case)
    result["ran"] = ran
    data = json.dumps(result).encode()
    while data:
        data = data[os.write(pipe, data) :]
    os._exit(0)


def contents(folder: Path) -> dict[str, object]:
    """Every file of a folder, and what is in it."""
    found: dict[str, object] = {}
    for parent, folders, names in os.walk(folder):
        for name in (*names, *folders):
            path = Path(parent, name)
            status = path.lstat()
            small = path.is_file() and not path.is_symlink() and status.st_size < 10**6 and os.access(path, os.R_OK)
            found[str(path.relative_to(folder))] = path.read_bytes() if small else (status.st_mode, status.st_ino)
    return found


def tried(case: Case, good: Path, folder: Path) -> str | None:
    """What is wrong with how a case ended; None: nothing."""
    shutil.copytree(good, folder, dirs_exist_ok=True)
    case.prepare(folder)
    (folder / "said.txt").touch()
    before = contents(folder)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        os.chdir(folder)
        try:
            child(case, writer)
        finally:
            os._exit(3)
    os.close(writer)
    data, until = b"", time.monotonic() + CLOCK_SECONDS
    while (left := until - time.monotonic()) > 0 and select.select([reader], [], [], left)[0]:
        if not (block := os.read(reader, 1 << 16)):
            break
        data += block
    else:
        os.kill(pid, signal.SIGKILL)
    os.close(reader)
    _, status, usage = os.wait4(pid, 0)
    if not data:
        said = (folder / "said.txt").read_text(errors="replace")[-500:]
        return f"hung, or died of signal {status & 127}: {said}"
    result = json.loads(data)
    if os.environ.get("HOSTILE_SHOW"):
        print(f"{case}: {result['ended']}: {' '.join(str(result['said']).split())[:300]}", flush=True)
    after = contents(folder)
    if MARK in after or result["ran"]:
        return f"ran code: {result['ran'] or 'the payload'}"
    if usage.ru_maxrss * 1024 > resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + MEMORY:
        return f"took {usage.ru_maxrss / 2**20:.1f} GB"
    if result["ended"] == "crashed":
        return f"crashed: {result['said'][-1500:]}"
    if result["ended"] == "refused":
        if case.argv is not None and not result["said"].strip():
            return "refused without a word"
        named = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", result["said"])) - set(
            re.findall(r"--[a-z][\w-]+", case.what)
        )
        if case.argv is not None and (strange := named - options_of(case.argv)):
            return f"names {strange}, which this command doesn't have: {result['said']}"
        if case.argv is not None and (python := re.search(r"`\w+=[^`]*`", result["said"])):
            return f"names {python[0]}, which is an argument in Python: {result['said']}"
        changed = {n for n in before.keys() | after.keys() if n != "said.txt" and before.get(n) != after.get(n)}
        changed = {name for name in changed if not _is_allowed(name)}
        if changed:
            return f"refused, but changed {sorted(changed)[:5]}: {result['said']}"
    if left_over := [name for name in after if ".dyconvert-part-" in name]:
        return f"left {left_over[:3]}"
    return None


def _is_allowed(name: str) -> bool:
    # A run that began and failed is to be resumed; what it wrote is whole. Empty folders of it are no half files.
    return name == "run" or name.startswith("run/")


_known_options: dict[tuple[str, ...], set[str]] = {}


def options_of(argv: list[str]) -> set[str]:
    """The options of a command, and those that a case gives it."""
    words = tuple(argv[:2] if argv and argv[0] in ("recipes", "bench") else argv[:1])
    given = {word for each in argv for word in _OPTION.findall(each)}
    if words not in _known_options:
        from dyconvert.cli.app import app

        with contextlib.redirect_stdout(open(os.devnull, "w")) as sink:
            del sink
        import typer.main

        command = typer.main.get_command(app)
        for word in words:
            command = getattr(command, "commands", {}).get(word, command)
        _known_options[words] = {name for parameter in command.params for name in parameter.opts} | {"--help"}
        _known_options[words] |= {name for parameter in command.params for name in parameter.secondary_opts}
    return _known_options[words] | given


def check(count: int, seed: int, good: Path, tmp_path: Path) -> None:
    wrong = []
    for number, case in enumerate(cases(count, good, seed)):
        # One below another, for a case may name the folder above.
        folder = tmp_path / str(number) / "here"
        folder.mkdir(parents=True)
        if problem := tried(case, good, folder):
            wrong.append(f"{number} {case}: {problem}")
            print(wrong[-1], flush=True)
        for each in folder.rglob("*"):
            with contextlib.suppress(OSError):
                each.chmod(0o700)
        shutil.rmtree(folder.parent, ignore_errors=True)
    assert not wrong, f"{len(wrong)} of {count}:\n" + "\n".join(text[:600] for text in wrong)
    assert listed(tmp_path) == []


@pytest.mark.parametrize("seed", [0, 1])
def test_some_hostile_inputs(seed, good, tmp_path):
    check(100, seed, good, tmp_path)


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(2, 14))
def test_hostile_inputs(seed, good, tmp_path):
    check(200, seed, good, tmp_path)
