"""Two processes, over gloo, train as one does."""

import os
import subprocess
import sys

import pytest
from finetune_nets import recipe

import dyconvert


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
@pytest.mark.parametrize(
    "start",
    [
        pytest.param([], id="its own processes"),
        pytest.param(["-m", "torch.distributed.run", "--nproc-per-node=2"], id="torchrun", marks=pytest.mark.sweep),
    ],
)
def test_two_processes_give_the_result_of_one(tmp_path, start):
    """At the same global batch. The network has no batch norm, whose statistics are of a process's share.

    Gradients are summed in another order, so they differ by rounding: about 1e-8 a step, of weights of 0.3, 12 steps.
    """

    def made(name: str, *overrides: str) -> dyconvert.Recipe:
        where = f"output.directory={tmp_path / name}"
        return recipe(tmp_path, where, *overrides, model="plain", distill={}, train={"clip": 1.0})

    whole = dyconvert.finetune(made("one"), progress=False, trust_code=True)
    file = tmp_path / "two.yaml"
    file.write_text(made("two", "train.devices=2").to_yaml(), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, *start, "-m", "dyconvert", "finetune", file, "--trust-code"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    one, two = (dyconvert.load(tmp_path / name / "last", trust_code=True).state_dict() for name in ("one", "two"))
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-6
    # Every validation image counted once, and one process speaks for both.
    assert dyconvert.finetuning.summary.Summary.read(tmp_path / "two").finetuned == pytest.approx(whole.finetuned)
    assert done.stdout.count("fine-tuned") == 1
