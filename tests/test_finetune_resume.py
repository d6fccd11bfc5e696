"""A run that was killed at any moment ends, once resumed, as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from finetune_killed import MOMENTS, everything
from finetune_nets import recipe
from nets import listed

import dyconvert
from dyconvert import RecipeError, TrainingError, finetune
from dyconvert.locks import Claim
from dyconvert.run_files import LOCK

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str], str]:
    """A folder of runs killed at every moment, how each process ended, and what they said."""
    folder = tmp_path_factory.mktemp("killed")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, HERE / "finetune_killed.py", folder, *MOMENTS], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder, dict(line.split(": ") for line in done.stdout.splitlines()), done.stderr


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], dict]:
    folder = tmp_path_factory.mktemp("whole")
    found = finetune(everything(folder), progress=False, trust_code=True)
    return weights(folder / "run"), comparable(found.to_json())


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """The best, the last and the averaged weights."""
    return {
        f"{part}.{name}": tensor
        for part in (".", "last", "ema")
        for name, tensor in dyconvert.load(directory / part, trust_code=True).state_dict().items()
    }


def comparable(summary: dict) -> dict:
    return {key: value for key, value in summary.items() if key not in ("directory", "seconds")}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kills forks at moments found through /proc")
@pytest.mark.parametrize("moment", MOMENTS)
def test_resumed_run_ends_bit_for_bit_as_an_uninterrupted_one(moment, killed, uninterrupted):
    folder, ended, _ = killed
    assert ended[moment] == ("130" if "ctrl-c" in moment else "-9")
    found = finetune(everything(folder / moment), resume=True, progress=False, trust_code=True)
    expected, summary = uninterrupted
    got = weights(folder / moment / "run")
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []
    assert comparable(found.to_json()) == summary
    steps = [line.split(",")[3] for line in (folder / moment / "run/metrics.csv").read_text().splitlines()[1:]]
    assert sorted({*steps}, key=int) == ["5", "11", "17"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="kills forks at moments found through /proc")
def test_ctrl_c_says_how_to_continue(killed):
    assert "--resume" in killed[2]
    assert "Saved at step 8" in killed[2]


def test_resuming_with_another_recipe_is_refused(tmp_path):
    finetune(recipe(tmp_path, train={"epochs": 1}), progress=False, trust_code=True)
    with pytest.raises(RecipeError, match=r"another recipe: .*train\.lr was 0\.05 and is 0\.5"):
        finetune(recipe(tmp_path, "train.lr=0.5", train={"epochs": 1}), resume=True, trust_code=True)
    # What the result doesn't depend on may change; a finished run is what it was, and a process that was killed at its
    # very end may have left this.
    (tmp_path / "run/resume.ckpt").touch()
    (tmp_path / "run/.dyconvert-part-0").mkdir()
    found = finetune(
        recipe(tmp_path, "data.workers=1", train={"epochs": 1}), resume=True, progress=False, trust_code=True
    )
    assert found.to_json() == json.loads((tmp_path / "run/summary.json").read_text()) | {
        key: value for key, value in found.to_json().items() if isinstance(value, tuple)
    }
    assert not {"resume.ckpt", ".dyconvert-part-0"} & {*listed(tmp_path / "run")}


def test_directories_that_hold_something_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="no run to resume"):
        finetune(recipe(tmp_path), resume=True, trust_code=True)
    finetune(recipe(tmp_path, "train.max_steps=1"), progress=False, trust_code=True)
    with pytest.raises(RecipeError, match=r"finished run.*resume=True"):
        finetune(recipe(tmp_path, "train.max_steps=1"), trust_code=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").write_text("mine")
    with pytest.raises(dyconvert.CheckpointError, match="other files"):
        finetune(recipe(tmp_path, f"output.directory={tmp_path / 'other'}"), trust_code=True)
    assert [file.name for file in (tmp_path / "other").iterdir()] == ["thesis.txt"]


def test_full_disk_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, capsys):
    """The second checkpoint doesn't fit: training goes on, and the first one is whole."""
    saves = 0
    kept = []
    flush = os.fsync

    def full(stream: int) -> None:
        nonlocal saves
        if os.readlink(f"/proc/self/fd/{stream}").endswith("/resume.ckpt"):
            saves += 1
            if saves > 1:
                kept.append((tmp_path / "run/resume.ckpt").read_bytes())
                raise OSError(28, "No space left on device")
        flush(stream)

    if not sys.platform.startswith("linux"):
        pytest.skip("finds the file through /proc")
    monkeypatch.setattr(os, "fsync", full)
    finetune(recipe(tmp_path, "output.checkpoint_steps=3"), trust_code=True)
    assert "No space left on device" in capsys.readouterr().err
    assert len(kept) >= 2
    assert len({*kept}) == 1


def test_divergence_stops_with_the_step_the_layer_and_what_to_try(tmp_path):
    made = recipe(tmp_path, "train.lr=1e4", "train.momentum=0", "output.checkpoint_steps=1", model="plain")
    with pytest.raises(TrainingError, match=r"at step \d+") as found:
        finetune(made, progress=False, trust_code=True)
    said = str(found.value)
    assert "train.lr" in said
    assert "dynamic.predictor_lr" in said
    assert "saturated" in said or "not finite" in said
    # What was saved before is finite.
    file = tmp_path / "run/resume.ckpt"
    if file.exists():
        state = torch.load(file, weights_only=False)["state_dict"]
        assert all(tensor.isfinite().all() for tensor in state.values())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_one_run_at_a_time(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    ready, written = os.pipe()
    if (other := os.fork()) == 0:
        taken = Claim(folder / LOCK).take()
        os.write(written, b"y" if taken else b"n")
        signal.pause()
    try:
        assert os.read(ready, 1) == b"y"
        with pytest.raises(RecipeError, match=r"A run is going on in .*run\. Wait for its end"):
            finetune(recipe(tmp_path, train={"epochs": 1}), progress=False, trust_code=True)
        assert [path.name for path in folder.iterdir()] == [LOCK]
    finally:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
    # A dead process holds nothing, though its file is there.
    assert (folder / LOCK).exists()
    finetune(recipe(tmp_path, train={"epochs": 1}), progress=False, trust_code=True)
    assert not (folder / LOCK).exists()
