"""What a save leaves behind where the disk is full, or the process is killed: the older model, and nothing else."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from nets import listed, same, trained

import dyconvert
from dyconvert import CheckpointError


def no_space(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def failing_at(step: int, real=os.replace):
    """An `os.replace` whose call number `step` finds no space."""
    calls = iter(range(step + 1))

    def replace(*args: object) -> None:
        if next(calls, step) == step:
            no_space()
        real(*args)

    return replace


FAILURES = {
    "weights": lambda patch: patch.setattr("dyconvert.checkpoint.tensors.save_file", no_space),
    "first rename": lambda patch: [patch.setattr(f"os.{name}", failing_at(0)) for name in ("replace", "rename")],
    "second rename": lambda patch: patch.setattr("os.replace", failing_at(1)),
    "flush": lambda patch: patch.setattr("os.fsync", no_space),
    "description": lambda patch: patch.setattr("pathlib.Path.write_text", no_space),
}


@pytest.mark.parametrize("before", ["a model", "an empty folder", "other files", "nothing"])
@pytest.mark.parametrize("failure", FAILURES)
def test_a_full_disk(failure, before, tmp_path, net):
    if (failure, before) == ("second rename", "nothing"):
        pytest.skip("a new directory takes its name in one rename")
    directory = tmp_path / "saved"
    older = trained(net)
    if before == "a model":
        dyconvert.save(older, directory)
    elif before != "nothing":
        directory.mkdir()
        if before == "other files":
            (directory / "notes.txt").write_text("mine")
    files = listed(tmp_path), listed(directory) if directory.exists() else None
    with pytest.MonkeyPatch.context() as patch:
        FAILURES[failure](patch)
        with pytest.raises(CheckpointError, match=r"(?s)can't be written: .*No space left.*Free some space"):
            dyconvert.save(trained(net, seed=1), directory, force=True)
    assert (listed(tmp_path), listed(directory) if directory.exists() else None) == files
    if before == "a model":
        assert same(dyconvert.load(directory, net), older)


# Forks a child per directory, which saves into it and kills itself at its step; prints how each ended.
KILLED = """
import os, signal, sys
import torch
import dyconvert, dyconvert.checkpoint.tensors
from nets import ResidualNet, seeded, trained

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

def steps(step, real=os.replace):
    if step == "weights written":
        dyconvert.checkpoint.tensors.save_file = lambda _, file, metadata: open(file, "wb").write(b"half") and die()
    calls = iter(["before the first rename", "before the second rename"])
    def replace(*args):
        call = next(calls)
        if call == step: die()
        real(*args)
        if call.replace("before", "after") == step: die()
    os.replace = replace

torch.set_num_threads(1)  # a fork doesn't take the threads along
newer = trained(seeded(ResidualNet), seed=1)
for directory in sys.argv[1:]:
    if (child := os.fork()) == 0:
        steps(os.path.basename(directory))
        dyconvert.save(newer, directory)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_killed_while_saving(tmp_path, net):
    # The older model until the last rename, the newer one from then on.
    survivors = dict.fromkeys(
        ["weights written", "before the first rename", "after the first rename", "before the second rename"], 0
    ) | {"after the second rename": 1}
    for step in survivors:
        dyconvert.save(trained(net), tmp_path / step)
    folders = [str(tmp_path / step) for step in survivors]
    child = subprocess.run(
        [sys.executable, "-c", KILLED, *folders], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120
    )
    assert child.stdout.split() == ["-9"] * len(survivors), child.stderr
    newest = trained(net, seed=2)
    for step, seed in survivors.items():
        assert same(dyconvert.load(tmp_path / step, net), trained(net, seed=seed)), step
        dyconvert.save(newest, tmp_path / step)
        assert same(dyconvert.load(tmp_path / step, net), newest)
        assert len(listed(tmp_path / step)) == 3


LIMITED = """
import resource, sys
import dyconvert
from nets import ResidualNet, seeded, trained

resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    dyconvert.save(trained(seeded(ResidualNet), seed=1), sys.argv[1])
except dyconvert.CheckpointError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits on this system")
def test_a_file_may_grow_no_further(tmp_path, net):
    dyconvert.save(trained(net), tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").stat().st_size > 20_000
    child = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "saved")],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "can't be written" in child.stdout, child.stderr
    assert listed(tmp_path / "saved") == ["README.md", "dyconvert.json", "model.safetensors"]
    assert same(dyconvert.load(tmp_path / "saved", net), trained(net))
