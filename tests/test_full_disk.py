"""A full disk, wherever a command writes: one message, exit code 2; what was there stays, and nothing else."""

import errno
import os
import sys
from pathlib import Path

import pytest
import torch

import dyconvert
from dyconvert import models
from dyconvert.cli import main

resource = pytest.importorskip("resource")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")

OLD = b"what was there"


def in_child(arguments: list[str], stdout: str, limit: int | None) -> tuple[int, str]:
    """Run a command in a fork that may write files of at most `limit` bytes; its exit code, and what it said."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        torch.set_num_threads(1)
        os.dup2(os.open(stdout, os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(writer, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        sys.argv = ["dyconvert", *arguments]
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException as error:
            sys.stderr.write(f"Traceback: {error!r}")
            code = 1
        sys.stderr.flush()
        os._exit(code)
    os.close(writer)
    said = b""
    while block := os.read(reader, 1 << 16):
        said += block
    os.close(reader)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said.decode()


@pytest.fixture
def saved(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    static, source = models.create("builtin:digits-resnet8", "none", {"width": 2})
    dyconvert.save(dyconvert.convert(static, g=2, example=torch.zeros(1, 1, 8, 8)), "saved", source=source)
    return tmp_path


def import_all() -> None:
    """What commands import lazily is imported before the forks."""
    import dyconvert.cli.opening
    import dyconvert.exporting.export
    import dyconvert.exporting.onnx_conv
    import dyconvert.finetuning.recipes  # noqa: F401


FILES = {
    "export": (["export", "saved", "--to", "torch", "--output", "x.pt2"], "x.pt2", 10_000),
    "export to ONNX": (["export", "saved", "--output", "x.onnx"], "x.onnx", 5_000),
    "collapse": (["collapse", "saved", "--output", "c.pth"], "c.pth", 1_000),
    "the end of collapse": (["collapse", "saved", "--output", "c.pth"], "c.pth", 12_000),
    "collapse to safetensors": (["collapse", "saved", "--output", "c.safetensors"], "c.safetensors", 1_000),
    "recipes cp": (["recipes", "cp", "quickstart", "q.yaml"], "q.yaml", 100),
    "convert": (["convert", "digits-resnet8", "--output", "out"], "out", 1_000),
}


@pytest.mark.parametrize("there", [False, True], ids=["nothing there", "over an old one"])
@pytest.mark.parametrize("what", FILES)
def test_files(what, there, saved):
    import_all()
    arguments, name, limit = FILES[what]
    if "ONNX" in what:
        pytest.importorskip("onnxruntime")
    place = saved / name
    if there and what == "convert":
        place.mkdir()
        (place / "notes.txt").write_bytes(OLD)
    elif there:
        place.write_bytes(OLD)
    before = {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()}
    code, said = in_child([*arguments, *(["--force"] if there else [])], os.devnull, limit)
    assert code == 2, said
    assert "can't be written" in said
    assert "Free some space" in said
    assert "Traceback" not in said
    assert {path: path.read_bytes() for path in saved.rglob("*") if path.is_file()} == before


OUTPUTS = {
    "ls": ["ls"],
    "ls --json": ["ls", "--json"],
    "methods": ["methods"],
    "inspect": ["inspect", "saved"],
    "inspect --json": ["inspect", "saved", "--json"],
    "bench --json": ["bench", "layers", "--layer", "4,4,3,8", "--repeats", "1", "--batch", "1", "--json"],
    "recipes show": ["recipes", "show", "quickstart"],
    "recipes ls": ["recipes", "ls"],
    "convert --json": ["convert", "digits-resnet8", "--output", "out", "--json"],
    "the plan": ["convert", "digits-resnet8", "--dry-run"],
    "help": ["--help"],
    "version": ["--version"],
}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
@pytest.mark.parametrize("what", OUTPUTS)
def test_stdout(what, saved):
    import_all()
    code, said = in_child(OUTPUTS[what], "/dev/full", None)
    assert code == 2, said
    assert os.strerror(errno.ENOSPC) in said
    assert said.count("Error:") == 1
    assert "Traceback" not in said
    assert "Exception ignored" not in said


def test_a_table_in_a_file_that_can_grow_no_further(saved):
    (saved / "kept.csv").write_bytes(OLD)
    code, said = in_child(OUTPUTS["inspect --json"], "table.json", 100)
    assert code == 2, said
    assert "Error:" in said
    assert (saved / "kept.csv").read_bytes() == OLD


def test_a_checkpoint_to_resume_from(tmp_path):
    # The run goes on with the last good one, so the process must live.
    checkpoints = pytest.importorskip("dyconvert.finetuning.training.checkpoints")
    file = tmp_path / "resume.ckpt"
    file.write_bytes(OLD)
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        try:
            checkpoints.AtomicCheckpointIO().save_checkpoint({str(n): torch.ones(500) for n in range(20)}, file)
        except dyconvert.TrainingError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert [path.name for path in tmp_path.iterdir()] == ["resume.ckpt"]
    assert file.read_bytes() == OLD
