"""Undocumented parts of Lightning that are used here, one function for each use.

`tests/test_lightning_internals.py` calls each, so pyproject.toml bounds Lightning's version. Nothing is imported
here: callers have the objects.
"""

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import WeightAveraging
    from lightning.pytorch.loggers import CSVLogger


def is_last_batch(trainer: "Trainer") -> bool:
    """Whether the batch that is being trained on is its epoch's last one.

    Callbacks get a batch's number, but not the number of batches if a loader has no length. If Lightning renames it,
    training fails at its first step.
    """
    return trainer.fit_loop.epoch_loop.batch_progress.is_last_batch


def batches_done(trainer: "Trainer") -> int:
    """Batches of the epoch that have been trained on, including the present one and those before a resume."""
    return trainer.fit_loop.epoch_loop.batch_idx + 1


def position_in(checkpoint: dict[str, Any]) -> tuple[int, int, int]:
    """The position that Lightning saved a checkpoint at: epoch, batches done in it, optimizer steps.

    The trainer restores it by itself, but the data's order is needed before. Lightning documents neither the keys nor
    their meaning. Other keys raise a KeyError, which is reported as a damaged checkpoint.
    """
    loop = checkpoint["loops"]["fit_loop"]
    epoch = loop["epoch_progress"]["current"]["processed"]
    batches = loop["epoch_loop.batch_progress"]
    done = 0 if batches["is_last_batch"] else batches["current"]["processed"]
    return epoch, done, checkpoint["global_step"]


def averaged_module(callback: "WeightAveraging") -> nn.Module:
    """The module with the callback's averaged weights. Lightning itself only swaps it in for validation."""
    return callback._average_model.module


def gathered_state(trainer: "Trainer") -> dict[str, Any]:
    """The state dict of the whole module, also if processes hold shards of it; every process must call this.

    Lightning makes its own checkpoints with this method of the strategy, and doesn't document it.
    """
    return trainer.strategy.lightning_module_state_dict()


def add_rows(logger: "CSVLogger", rows: list[dict[str, Any]]) -> None:
    """Give a CSV logger the rows that the run wrote before it was resumed, which it would otherwise overwrite.

    The logger writes its file from its list of rows. If Lightning renames it, a resumed run fails before it trains.
    """
    logger.experiment.metrics.extend(rows)
