"""Saves a run's results: the best, the last and the averaged weights, and the metrics of its epochs."""

import csv
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer, loggers
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from torch import nn

from dyconvert import checkpoint, models
from dyconvert.errors import CheckpointError, RecipeError, brief
from dyconvert.finetuning.recipes.recipe import Recipe
from dyconvert.finetuning.training.display import Display
from dyconvert.finetuning.training.lightning_internals import add_rows, gathered_state
from dyconvert.finetuning.training.module import METRIC, FineTuner
from dyconvert.finetuning.training.schedules import Ema
from dyconvert.limits import CSV_BYTES, read_text
from dyconvert.run_files import EMA, LAST, METRICS

_STATE = ("best", "best_epoch", "last", "last_step")


class Results(Callback):
    """Saves the best weights after each validation, and the last at the end; tells the display each epoch's metric.

    Args:
        whole: a copy of the network that gathers the weights, if a strategy shards them.

    Attributes:
        best, best_epoch: the highest metric so far, and its epoch, counted from 1.
        began: whether training has begun; before that, Lightning restores the checkpoint.
        last, last_step: the newest metric, and the number of steps after which it was measured.
    """

    def __init__(
        self,
        directory: Path,
        source: "models.Source",
        ema: Ema | None,
        whole: nn.Module | None,
        report: Callable[[str], None],
        display: Display,
    ) -> None:
        self.display = display
        self.directory, self.source, self.ema, self.whole, self.report = directory, source, ema, whole, report
        self.best, self.best_epoch = float("-inf"), 0
        self.last, self.last_step = float("nan"), -1
        self.seconds = 0.0
        self.began = False
        self._finished = False
        self._since = time.monotonic()
        self._epoch_began = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        return {**{key: getattr(self, key) for key in _STATE}, "seconds": self.elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for key in (*_STATE, "seconds"):
            setattr(self, key, state_dict[key])

    def elapsed(self) -> float:
        """Seconds of training and validation, including those before a resume."""
        return self.seconds + time.monotonic() - self._since

    def on_train_start(self, trainer: Trainer, pl_module: FineTuner) -> None:
        self.began = True
        self._since = self._epoch_began = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: FineTuner) -> None:
        value = float(trainer.callback_metrics[METRIC])
        self.last, self.last_step = value, trainer.global_step
        module = self.ema.averaged if self.ema is not None else pl_module
        better = self.consider(trainer, value, module.model, trainer.current_epoch + 1)
        seconds, self._epoch_began = time.monotonic() - self._epoch_began, time.monotonic()
        self.display.epoch(trainer, pl_module, value, seconds, better)

    def consider(self, trainer: Trainer, value: float, model: nn.Module, epoch: int) -> bool:
        """Save `model` if its metric is the best so far; return whether it is."""
        if value <= self.best and self.best_epoch:
            return False
        self.best, self.best_epoch = value, epoch
        self._save(trainer, model, self.directory)
        return True

    def on_train_end(self, trainer: Trainer, pl_module: FineTuner) -> None:
        self.finish(trainer, pl_module)

    def finish(self, trainer: Trainer, pl_module: FineTuner) -> None:
        """Save the last weights, and the averaged ones; without effect the second time.

        Resuming a run that was stopped after its last epoch doesn't train, so Lightning doesn't call `on_train_end`.
        """
        if self._finished:
            return
        self._save(trainer, pl_module.model, self.directory / LAST, optional=False)
        if self.ema is not None:
            self._save(trainer, self.ema.averaged.model, self.directory / EMA, optional=False)
        self._finished = True

    def _save(self, trainer: Trainer, model: nn.Module, directory: Path, optional: bool = True) -> None:
        model = self._whole(trainer, model)
        if not trainer.is_global_zero:
            return
        try:
            save_network(model, directory, self.source)
        except CheckpointError as error:
            # The run goes on: it resumes from another file than this.
            if not optional:
                raise
            self.report(str(error))

    def _whole(self, trainer: Trainer, model: nn.Module) -> nn.Module:
        """The model; if its weights are sharded, a copy that has all of them."""
        if self.whole is None:
            return model
        state = gathered_state(trainer)
        if trainer.is_global_zero:
            weights = {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
            self.whole.load_state_dict(weights)
        return self.whole


def save_network(model: nn.Module, directory: Path, source: "models.Source") -> None:
    """Save a network, dynamic or static, so that `dyconvert.load` reads it."""
    checkpoint.save(model, directory, source=source, force=True, static=True)


def make_loggers(recipe: Recipe, step: int | None) -> list[Logger]:
    """The recipe's loggers, and that of metrics.csv, which is always there.

    Raises:
        RecipeError: a logger's package isn't installed.
    """
    directory = str(recipe.directory)
    built: list[Logger] = [_csv_logger(recipe.directory, step)]
    for name in recipe.output.loggers:
        try:
            if name == "tensorboard":
                built.append(loggers.TensorBoardLogger(directory, name="", version="tensorboard"))
            elif name == "wandb":
                built.append(loggers.WandbLogger(name=recipe.name, save_dir=directory))
            elif name == "mlflow":
                built.append(loggers.MLFlowLogger(recipe.name, save_dir=str(recipe.directory / "mlruns")))
        except ImportError as error:
            raise RecipeError(
                f"output.loggers has {name}, which can't be used: {brief(error)}. Install it, or leave it out."
            ) from error
    return built


def _csv_logger(directory: Path, step: int | None) -> loggers.CSVLogger:
    """Lightning's logger, of metrics.csv in `directory`.

    Args:
        step: the step that the run resumes at; rows before it stay. None for a new run.
    """
    file = directory / METRICS
    earlier_rows = []
    if step is not None and file.is_file():
        try:
            rows = csv.DictReader(io.StringIO(read_text(file, CSV_BYTES), newline=""))
            earlier_rows = [row for row in rows if int(row["step"]) < step]
        except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
            raise RecipeError(f"{file} can't be read: {brief(error)}. Remove it, and the run goes on.") from error
    file.unlink(missing_ok=True)
    logger = loggers.CSVLogger(str(directory), name="", version="", flush_logs_every_n_steps=1)
    if earlier_rows:
        # Lightning's writer starts an empty file, so the earlier rows are given to it.
        add_rows(logger, [{key: value for key, value in row.items() if value != ""} for row in earlier_rows])
        logger.save()
    return logger
