"""Makes Lightning's Trainer from a recipe, and checks its devices."""

import os
from collections.abc import Sequence

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from dyconvert.errors import RecipeError
from dyconvert.finetuning.recipes.recipe import Recipe
from dyconvert.finetuning.training.checkpoints import AtomicCheckpointIO

# Steps between two rows of the log: reading the loss from a GPU and writing a row at every step takes noticeable time.
_LOG_EVERY = 50


def make_trainer(recipe: Recipe, callbacks: Sequence[Callback], loggers: list[Logger]) -> Trainer:
    """A Trainer on the recipe's devices. Checkpoints are a callback's."""
    train = recipe.train
    return Trainer(
        accelerator=train.accelerator,
        devices=train.devices,
        num_nodes=train.nodes,
        strategy=train.strategy,
        precision=train.precision,
        max_epochs=train.epochs,
        max_steps=train.max_steps or -1,
        accumulate_grad_batches=train.accumulate,
        gradient_clip_val=train.clip,
        callbacks=list(callbacks),
        logger=loggers or False,
        log_every_n_steps=_LOG_EVERY,
        plugins=[AtomicCheckpointIO()],
        default_root_dir=str(recipe.directory),
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )


def is_main_process() -> bool:
    """Whether this is the process that prints and writes."""
    return rank_zero_only.rank == 0  # type: ignore[attr-defined]  # Lightning sets it on the function


def check_devices(recipe: Recipe) -> None:
    """Check the recipe's devices.

    Raises:
        RecipeError: there are fewer devices than the recipe asks for, or its settings don't work on several.
    """
    train = recipe.train
    if train.strategy == "fsdp" and train.ema is not None:
        raise RecipeError(
            "train.ema can't average weights that train.strategy=fsdp shards. Set one of them to null or ddp."
        )
    kind = train.accelerator
    if kind == "auto":
        kind = "gpu" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    there = {
        "gpu": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
        "cpu": os.cpu_count() or 1,
    }[kind]
    name = {"gpu": "GPUs", "mps": "MPS devices", "cpu": "CPU cores"}[kind]
    requested = train.devices if isinstance(train.devices, int) else 1
    if requested > there:
        raise RecipeError(
            f"The recipe wants {requested} {name} (train.devices, train.accelerator), and this machine has {there}. "
            "Set train.devices to what there is, or train.accelerator to another kind."
        )
    if train.strategy == "fsdp" and kind != "gpu":
        raise RecipeError("train.strategy=fsdp needs GPUs, and there are none. Set it to auto or ddp.")
