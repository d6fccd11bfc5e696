"""What is used of Lightning that it doesn't document, one function a use.

`tests/test_lightning_internals.py` calls each, and pyproject.toml bounds Lightning's version for that reason. Nothing
is imported here: callers have the objects.
"""

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import WeightAveraging
    from lightning.pytorch.loggers import CSVLogger


def is_last_batch(trainer: "Trainer") -> bool:
    """Whether the batch that is being trained on is its epoch's last one.

    Callbacks are told a batch's number, and not how many there are where a loader has no length. Renamed, training
    fails at its first step.
    """
    return trainer.fit_loop.epoch_loop.batch_progress.is_last_batch


def batches_done(trainer: "Trainer") -> int:
    """How many batches of the epoch have been trained on: the present one counts, and so do those before a resume."""
    return trainer.fit_loop.epoch_loop.batch_idx + 1


def position_in(checkpoint: dict[str, Any]) -> tuple[int, int, int]:
    """Where a checkpoint of Lightning's was saved: epoch, batches done in it, optimizer steps.

    The trainer goes on there by itself, but the data's order needs to know it before. Lightning documents neither the
    keys nor what they count. Other keys are a KeyError, which is reported as a damaged checkpoint.
    """
    loop = checkpoint["loops"]["fit_loop"]
    epoch = loop["epoch_progress"]["current"]["processed"]
    batches = loop["epoch_loop.batch_progress"]
    done = 0 if batches["is_last_batch"] else batches["current"]["processed"]
    return epoch, done, checkpoint["global_step"]


def averaged_module(callback: "WeightAveraging") -> nn.Module:
    """The module that holds the moving average of a callback's weights. Lightning only swaps it in for validation."""
    return callback._average_model.module


def gathered_state(trainer: "Trainer") -> dict[str, Any]:
    """The state dict of the whole module, also where processes hold shards of it: all of them must call this.

    The strategy's method is what Lightning's own checkpoints are made with, and isn't documented.
    """
    return trainer.strategy.lightning_module_state_dict()


def add_rows(logger: "CSVLogger", rows: list[dict[str, Any]]) -> None:
    """Give a CSV logger the rows of an earlier run of it, which it would otherwise overwrite.

    Its list of rows is what it writes the file from. Renamed, a resumed run fails before it trains.
    """
    logger.experiment.metrics.extend(rows)
