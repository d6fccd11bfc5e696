"""Saves the checkpoints that a run resumes from, each in one step, so that the last one is always complete."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from dyconvert.errors import RecipeError, TrainingError, brief
from dyconvert.files import replaced
from dyconvert.finetuning.recipes.schema import Output
from dyconvert.finetuning.training.guard import DivergenceGuard
from dyconvert.finetuning.training.interrupts import Interrupted, Interrupts
from dyconvert.finetuning.training.lightning_internals import batches_done, is_last_batch, position_in
from dyconvert.finetuning.training.module import FineTuner
from dyconvert.limits import check_archive


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a new file beside the old one, and renames it when it is on the disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with replaced(Path(path), TrainingError) as file:
            torch.save(checkpoint, file)


class Checkpoints(Callback):
    """Saves the run's state: every so many steps or minutes, at each epoch's end, and on Ctrl-C.

    Args:
        file: the checkpoint.
        guard: checks the loss before a good checkpoint is replaced.
        interrupts: knows whether the user wants to stop.
    """

    def __init__(
        self,
        file: Path,
        output: Output,
        guard: DivergenceGuard,
        interrupts: Interrupts,
        report: Callable[[str], None],
    ) -> None:
        self.file, self.output = file, output
        self.guard, self.interrupts, self.report = guard, interrupts, report
        self._saved_at = time.monotonic()
        self._saved_step = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: FineTuner, *args: Any) -> None:
        if is_last_batch(trainer):
            return  # the epoch's end, after the validation, saves
        if batches_done(trainer) % trainer.accumulate_grad_batches:
            return  # accumulated gradients aren't saved
        stop = self._in_any_process(trainer, self.interrupts.requested)
        if stop or self._in_any_process(trainer, self._due(trainer)):
            self._save(trainer, pl_module)
        if stop:
            raise Interrupted

    def on_train_epoch_end(self, trainer: Trainer, pl_module: FineTuner) -> None:
        self._save(trainer, pl_module)
        if self._in_any_process(trainer, self.interrupts.requested):
            raise Interrupted

    def _due(self, trainer: Trainer) -> bool:
        steps, minutes = self.output.checkpoint_steps, self.output.checkpoint_minutes
        if steps is not None and trainer.global_step - self._saved_step >= steps:
            return True
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def _in_any_process(self, trainer: Trainer, here: bool) -> bool:
        """Whether it is true in any process: saving needs all of them."""
        if trainer.world_size == 1:
            return here
        return trainer.strategy.reduce_boolean_decision(here, all=False)

    def _save(self, trainer: Trainer, pl_module: FineTuner) -> None:
        self.guard.check(trainer, pl_module)
        try:
            trainer.save_checkpoint(self.file)
        except TrainingError as error:
            if not self.file.exists():
                raise
            # The run goes on: the disk may have room again later.
            self.report(f"the checkpoint can't be written, the last good one is kept: {error}")
        self._saved_at, self._saved_step = time.monotonic(), trainer.global_step


def position(file: Path) -> tuple[int, int, int]:
    """The position that a checkpoint was saved at: epoch, batches done in it, optimizer steps.

    Raises:
        RecipeError: it can't be read.
    """
    try:
        check_archive(file)
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return position_in(checkpoint)
    except Exception as error:
        # The checkpoint is loaded without running code: a sweep may continue in a folder that others have written.
        raise unreadable(file, error) from error


def unreadable(file: Path, error: Exception) -> RecipeError:
    """The error for a checkpoint that no run can resume from."""
    return RecipeError(f"The checkpoint {file} can't be read: {brief(error)}. Remove the directory and start anew.")
