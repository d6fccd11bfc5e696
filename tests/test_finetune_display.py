"""What fine-tuning prints: a table of epochs that stays, with a bar in a terminal, and plain lines elsewhere."""

import json
import os
import pty
import re
import subprocess
import sys

import pytest

import dyconvert
from dyconvert.finetuning import load_recipe

pytest.importorskip("lightning")

SHORT = ["train.epochs=3", "pretrain=null", "data.workers=0", "train.accelerator=cpu", "train.devices=1"]


def in_a_terminal(arguments, folder, columns=80):
    """What a terminal gets from a command, and its exit code."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "dyconvert", *arguments],
        cwd=folder,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=os.environ | {"COLUMNS": str(columns), "LINES": "40", "TERM": "xterm-256color"},
    )
    os.close(theirs)
    read = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # how Linux says that the other end is closed
            break
        if not part:
            break
        read += part
    os.close(ours)
    return read.decode(), process.wait(timeout=60)


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_one_display_in_a_terminal(tmp_path):
    said, code = in_a_terminal(["finetune", "quickstart", *SHORT, "output.directory=out"], tmp_path)
    assert code == 0, said
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said).replace("\r", "\n")
    rows = [line.split() for line in text.splitlines() if re.match(r" +\d/3 ", line)]
    assert [row[0] for row in rows] == ["1/3", "2/3", "3/3"]  # each once, counted from 1
    assert "epoch " in text
    assert said.count("\x1b[?25l") == said.count("\x1b[?25h")  # the cursor is back
    assert max(map(len, text.splitlines())) <= 80


def test_plain_lines_elsewhere(tmp_path, capfd):
    dyconvert.finetune(load_recipe("quickstart", [*SHORT, f"output.directory={tmp_path / 'out'}"]), trust_code=True)
    said = capfd.readouterr()
    assert not said.out
    assert re.findall(r"^epoch (\d)/3  loss \d\.\d{4}  top-1 [\d.]+ %  \S+ s", said.err, re.MULTILINE) == [*"123"]
    assert "\x1b" not in said.err


def test_quiet(cli):
    ran = cli("finetune", "quickstart", *SHORT, "output.directory=out", "-q")
    assert (ran.code, ran.stdout, ran.stderr) == (0, "", "")


def test_library_code_imports_no_command_line(tmp_path):
    code = (
        "import sys, dyconvert.finetuning.run, dyconvert.analysis.study, dyconvert.report.write; "
        "assert not [m for m in sys.modules if m.startswith(('dyconvert.cli', 'typer'))]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_dry_run_without_the_data(cli, tmp_path):
    arguments = ["finetune", "cifar10-resnet20", "--dry-run", "model.weights=none"]
    ran = cli(*arguments)
    assert ran.code == 0, ran.said
    for said in ("19 convs: 18 converted", "269.72 k", "which isn't there", "data.root", "learning rate", "10 epochs"):
        assert said in ran.said
    found = json.loads(cli(*arguments, "--json").stdout)
    assert found["images"] is None
    assert found["steps"] is None
    assert "There is no data folder" in found["missing"]
    assert [row["lr"] for row in found["schedule"]][1] == 0.01
    assert not list(tmp_path.iterdir())
    # Data that is there and wrong is an error, as in a run.
    (tmp_path / "data" / "train").mkdir(parents=True)
    assert cli(*arguments, "data.root=data").code == 2
