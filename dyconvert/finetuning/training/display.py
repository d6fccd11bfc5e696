"""Shows a run's progress: in a terminal a table of the epochs with a bar below it; elsewhere a line for each epoch."""

import time
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from dyconvert import console
from dyconvert.finetuning.training.module import METRIC_NAMES, FineTuner

# Seconds between two reads of the loss: reading it from a GPU waits for the step.
_EVERY = 0.25


class Display(Callback):
    """Shows a run's progress on stderr.

    Args:
        shown: False in processes that print nothing.
        terminal: whether to show a bar; by default, whether stdout and stderr are terminals.
        averaged: the metric is that of the averaged weights.
    """

    def __init__(self, shown: bool, averaged: bool = False, terminal: bool | None = None) -> None:
        self.shown, self.averaged = shown, averaged
        self.live = shown and (console.out.is_terminal and console.err.is_terminal if terminal is None else terminal)
        self._bar: Progress | None = None
        self._task: Any = None
        self._began, self._first, self._looked = 0.0, 0, 0.0

    @property
    def _console(self) -> Console:
        return console.err

    def on_train_start(self, trainer: Trainer, pl_module: FineTuner) -> None:
        self._began, self._first = time.monotonic(), trainer.global_step
        if not self.live:
            return
        name = METRIC_NAMES[pl_module.recipe.data.task]
        head = f"{'epoch':>9} {'loss':>9} {name + ' %':>9} {'time':>8}  {pl_module.recipe.name}"
        self._console.print(head, style="bold")
        if self.averaged:
            self._console.print(f"{name} is that of the averaged weights", style="dim")
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[now]}", markup=False),
            console=self._console,
            transient=True,
            expand=True,
            refresh_per_second=4,
        )
        self._bar.start()
        self._task = self._bar.add_task("", total=_steps(trainer, pl_module), completed=trainer.global_step, now="")
        self._show(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: FineTuner, *_: Any) -> None:
        if self._bar is not None and time.monotonic() - self._looked > _EVERY:
            self._show(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: FineTuner) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=trainer.global_step, now="validating")

    def on_train_end(self, trainer: Trainer, pl_module: FineTuner) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: FineTuner, exception: BaseException) -> None:
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: FineTuner, stage: str) -> None:
        self._stop()

    def epoch(self, trainer: Trainer, pl_module: FineTuner, value: float, seconds: float, best: bool) -> None:
        """Print the row of an epoch that has ended.

        Args:
            value: the metric, in percent.
            best: it is the highest so far.
        """
        loss = pl_module.mean_loss  # every process must call it, because it reduces
        if not self.shown:
            return
        number = f"{trainer.current_epoch + 1}/{trainer.max_epochs}"
        if self.live:
            row = f"{number:>9} {loss:>9.4f} {value:>9.2f} {duration(seconds):>8}"
            self._console.print(row + ("  best so far" if best else ""))
            return
        name = METRIC_NAMES[pl_module.recipe.data.task] + (" (EMA)" if self.averaged else "")
        self._console.print(
            f"epoch {number}  loss {loss:.4f}  {name} {value:.2f} %  {duration(seconds)}"
            f"{'  best so far' if best else ''}"
        )

    def _show(self, trainer: Trainer, pl_module: FineTuner) -> None:
        self._looked = time.monotonic()
        step, total = trainer.global_step, _steps(trainer, pl_module)
        fields = []
        loss = pl_module.last_loss
        if loss is not None:
            fields.append(f"loss {loss.item():.4f}")
        fields.append(f"lr {trainer.optimizers[0].param_groups[0]['lr']:.1e}")
        done, elapsed = step - self._first, self._looked - self._began
        if done and elapsed > 0:
            fields.append(f"{done * pl_module.recipe.train.batch / elapsed:,.0f} img/s")
            fields.append(f"{duration((total - step) * elapsed / done)} left")
        self._bar.update(
            self._task,
            description=f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}",
            completed=step,
            total=total,
            now="  ".join(fields),
        )

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def duration(seconds: float) -> str:
    """12 s, 4:05, 1:04:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest} s"


def _steps(trainer: Trainer, pl_module: FineTuner) -> int:
    steps = pl_module.per_epoch * (trainer.max_epochs or 1)
    return min(steps, trainer.max_steps) if trainer.max_steps > 0 else steps
