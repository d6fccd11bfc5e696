"""SIGKILL at random moments: what is there is the old or the new, whole; the next run ends the same and tidies up.

`pytest -m sweep tests/test_killed.py -n 2` kills each of the jobs a hundred times; the default run a few times.
"""

import contextlib
import csv
import json
import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from nets import ResidualNet, listed, same, seeded, trained

import dyconvert

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")

TIMES = [3, pytest.param(100, marks=pytest.mark.sweep)]


def run_in_child(job: Callable[[], object], delay: float | None) -> float | None:
    """Run a job in a fork, and kill it after `delay` seconds; how many it took, or None if it hadn't ended by then."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        torch.set_num_threads(1)
        null = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(null, stream)
        with contextlib.suppress(BaseException):
            job()
            os.write(writer, b"x")
        os._exit(0)
    os.close(writer)
    began = time.monotonic()  # the fork itself takes longer than a short job
    ended = bool(select.select([reader], [], [], delay)[0]) and os.read(reader, 1) == b"x"
    took = time.monotonic() - began
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(reader)
    return took if ended else None


def killed(job: Callable[[], object], times: int, prepare: Callable[[], object], check: Callable[[], object]) -> None:
    """Kill a job at so many moments, spread at random over the time that it takes, and check what is there."""
    prepare()
    took = run_in_child(job, None)
    assert took is not None
    draw, caught = random.Random(0), 0
    for _ in range(times):
        prepare()
        if (seconds := run_in_child(job, draw.uniform(0, took))) is None:
            caught += 1
        else:
            took = min(took, seconds)  # the first one may have been slow
        check()
    # Where hardly one was caught, nothing was shown.
    assert times < 20 or caught > times // 4, f"{caught} of {times}"


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".dyconvert-part-*")] + list(folder.rglob("*.part"))


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("over_an_old_one", [False, True])
def test_save(over_an_old_one, times, tmp_path):
    net = seeded(ResidualNet, 32)
    old, new = (trained(net, seed=seed, g=2) for seed in (1, 2))
    directory = tmp_path / "saved"

    def prepare() -> None:
        if over_an_old_one:
            dyconvert.save(old, directory)
        elif directory.exists():
            for file in directory.iterdir():
                file.unlink()
            directory.rmdir()

    def check() -> None:
        if over_an_old_one or directory.exists():
            loaded = dyconvert.load(directory, net)
            assert same(loaded, new) or (over_an_old_one and same(loaded, old))
        dyconvert.save(new, directory)
        assert same(dyconvert.load(directory, net), new)
        assert not leftovers(tmp_path)
        assert len(listed(directory)) == 3

    killed(lambda: dyconvert.save(new, directory), times, prepare, check)


@pytest.mark.parametrize("times", TIMES)
def test_convert(times, tmp_path, monkeypatch):
    from dyconvert.cli.app import run

    monkeypatch.chdir(tmp_path)
    words = ["convert", "digits-resnet8", "--output", "out", "--force", "--g"]
    # Imported before the forks.
    assert run([*words, "3"]) == 0
    old = dyconvert.load("out")
    states = {2: None, 3: old}

    def check() -> None:
        loaded = dyconvert.load("out")
        assert any(same(loaded, each) for each in states.values() if each is not None) or states[2] is None
        assert run([*words, "2"]) == 0
        states[2] = states[2] or dyconvert.load("out")
        assert same(dyconvert.load("out"), states[2])
        assert listed(tmp_path) == ["out"]
        assert len(listed(tmp_path / "out")) == 3

    killed(lambda: run([*words, "2"]), times, lambda: dyconvert.save(old, "out", force=True), check)


@pytest.mark.parametrize("times", TIMES)
def test_report(times, tmp_path):
    pytest.importorskip("matplotlib")
    from dyconvert.analysis.study import analyse
    from dyconvert.report.write import write_report

    example = torch.zeros(1, 3, 16, 16)
    made = analyse(trained(seeded(ResidualNet), g=2), example=example, sizes=(), seconds=0)
    old, new = (made.model_copy(update={"name": name}) for name in ("the-old-one", "the-new-one"))
    directory = tmp_path / "report"

    def check() -> None:
        content = json.loads((directory / "report.json").read_text())
        page = (directory / "report.html").read_text()
        assert [name in page for name in ("the-old-one", "the-new-one")].count(True) == 1
        assert content["name"] in page
        there = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
        assert there == set(content["files"])
        write_report(new, directory, force=True)
        assert listed(tmp_path) == ["report"]
        assert not leftovers(tmp_path)

    killed(
        lambda: write_report(new, directory, force=True),
        times,
        lambda: write_report(old, directory, force=True),
        check,
    )


def states(run: Path) -> dict[str, torch.Tensor]:
    """All the weights that a run left."""
    from safetensors.torch import load_file

    return {
        f"{file.parent.name}.{name}": tensor
        for file in sorted(run.rglob("model*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("times", TIMES)
def test_finetune(times, tmp_path):
    from finetune_nets import recipe

    sections = {
        "pretrain": {"epochs": 1, "lr": 0.05},
        "train": {"epochs": 2, "ema": 0.9},
        "output": {"checkpoint_steps": 2, "checkpoint_minutes": None},
    }
    (tmp_path / "whole").mkdir()

    def made(name: str) -> dyconvert.Recipe:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        output = sections["output"] | {"directory": str(folder / "run")}
        return recipe(folder, **(sections | {"output": output}))

    def go(name: str) -> object:
        one = made(name)
        started = (one.directory / "recipe.yaml").is_file()
        return dyconvert.finetune(one, resume=started, progress=False, trust_code=True)

    go("whole")
    wanted, number = states(tmp_path / "whole" / "run"), 0

    def prepare() -> None:
        nonlocal number
        number += 1

    def check() -> None:
        go(str(number))
        run = tmp_path / str(number) / "run"
        assert equal(states(run), wanted)
        assert not leftovers(run)
        assert not list(run.rglob("run.lock")) + list(run.rglob("resume.ckpt"))
        assert {"last", "ema", "pretrain", "summary.json"} <= set(listed(run))

    killed(lambda: go(str(number)), times, prepare, check)


@pytest.mark.parametrize("times", TIMES)
def test_sweep(times, tmp_path):
    from finetune_nets import recipe

    from dyconvert.finetuning.sweeps.runner import Runner
    from dyconvert.finetuning.sweeps.schema import load_sweep

    recipe(tmp_path, train={"epochs": 1}, output={"checkpoint_steps": 2})
    (tmp_path / "s.yaml").write_text(
        "recipe: tiny.yaml\nruns:\n  - {name: a}\n  - {name: b, overrides: [convert=null]}\nseeds: [0]\n"
    )
    number = 0

    def go(name: str) -> list[dict[str, object]]:
        runner = Runner(load_sweep(tmp_path / "s.yaml"), tmp_path / name)
        assert not runner.run(trust_code=True)
        return [{key: value for key, value in row.items() if key != "seconds"} for row in runner.rows()]

    wanted = go("whole")

    def prepare() -> None:
        nonlocal number
        number += 1

    def check() -> None:
        table = tmp_path / str(number) / "sweep.csv"
        if table.exists():
            with table.open(newline="") as stream:
                assert all(row["fingerprint"] for row in csv.DictReader(stream))
        assert go(str(number)) == wanted
        assert not leftovers(tmp_path / str(number))

    sys.stderr.flush()
    killed(lambda: go(str(number)), times, prepare, check)
