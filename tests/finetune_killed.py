"""Runs recipes that are killed at given moments, each in a fork of this process: Lightning is imported only once.

usage: finetune_killed.py FOLDER MOMENT...
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from finetune_nets import recipe

import dyconvert.finetuning.run  # noqa: F401  (before the forks, for it takes seconds)
from dyconvert import Recipe, finetune
from dyconvert.finetuning.training.module import FineTuner

# All that a resumed run has to go on with: averages, temperatures, dropout, mixing, accumulated batches.
SECTIONS = {
    "convert": {"method": "dyconv", "g": 3},
    "train": {"epochs": 3, "ema": 0.9, "mixup": 0.2, "accumulate": 2, "warmup_epochs": 0.5},
    "dynamic": {"temperature": {"start": 30, "end": 1, "epochs": 2}, "freeze_experts_epochs": 0.5},
    "distill": {},
    "output": {"checkpoint_steps": 2, "checkpoint_minutes": None},
}


def everything(folder: Path) -> Recipe:
    """The recipe that is killed: 18 steps, 6 an epoch."""
    folder.mkdir(exist_ok=True)
    sections = SECTIONS | {"output": SECTIONS["output"] | {"directory": str(folder / "run")}}
    return recipe(folder, **sections)


def at_step(step: int, number: int = signal.SIGKILL) -> None:
    before, done = FineTuner.on_train_batch_start, False

    def hook(self: FineTuner, *arguments: object) -> None:
        nonlocal done
        if self.global_step == step and not done:
            done = True
            os.kill(os.getpid(), number)
        before(self, *arguments)

    FineTuner.on_train_batch_start = hook


def in_validation(epoch: int, number: int = signal.SIGKILL) -> None:
    before, done = FineTuner.validation_step, False

    def hook(self: FineTuner, *arguments: object) -> None:
        nonlocal done
        fitting = self.trainer.training is False and self.trainer.state.fn == "fit"
        if fitting and self.current_epoch == epoch and not done:
            done = True
            os.kill(os.getpid(), number)
        before(self, *arguments)

    FineTuner.validation_step = hook


def in_checkpoint(count: int) -> None:
    """When the checkpoint is on the disk but hasn't its name yet."""
    before, done = os.fsync, 0

    def hook(stream: int) -> None:
        nonlocal done
        done += os.readlink(f"/proc/self/fd/{stream}").endswith("/resume.ckpt")
        if done == count:
            os.kill(os.getpid(), signal.SIGKILL)
        before(stream)

    os.fsync = hook


MOMENTS: dict[str, Callable[[], None]] = {
    "first step": lambda: at_step(1),
    "mid epoch": lambda: at_step(9),
    "epoch end": lambda: at_step(12),
    "validation": lambda: in_validation(1),
    "checkpoint": lambda: in_checkpoint(5),
    "ctrl-c": lambda: at_step(7, signal.SIGINT),
    "ctrl-c in the last validation": lambda: in_validation(2, signal.SIGINT),
    "the last validation": lambda: in_validation(2),
}


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for moment in sys.argv[2:]:
        child = os.fork()
        if child:
            print(f"{moment}: {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}", flush=True)
            continue
        try:
            MOMENTS[moment]()
            finetune(everything(folder / moment), trust_code=True)
        except KeyboardInterrupt:
            os._exit(130)
        except BaseException:
            traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    main()
