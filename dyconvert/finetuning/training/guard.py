"""Stops a run that diverges, and says where it diverged."""

import math
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from dyconvert.errors import TrainingError, some
from dyconvert.finetuning.training.module import FineTuner, guess_loss
from dyconvert.nn.mixture import Mixture
from dyconvert.run_files import CHECKPOINT

# A network that guesses has a loss of log(classes). One whose loss is this many times as large doesn't recover.
_DIVERGED = 100.0
# Reading the loss of a GPU waits for the step, so it is read only now and then.
_EVERY = 20
# A coefficient nearer than this to 0 or 1 hardly gets a gradient.
_SATURATED = 0.01


class DivergenceGuard(Callback):
    """Raises TrainingError at a loss that isn't finite, or far beyond guessing."""

    def on_before_zero_grad(self, trainer: Trainer, pl_module: FineTuner, optimizer: Any) -> None:
        # Lightning calls this before the weights change: they and the images are still those of this loss.
        loss = pl_module.last_loss
        if loss is None or (loss.device.type != "cpu" and trainer.global_step % _EVERY):
            return
        self.check(trainer, pl_module)

    def check(self, trainer: Trainer, pl_module: FineTuner) -> None:
        """Check the last loss.

        Raises:
            TrainingError: it isn't finite, or far beyond that of guessing.
        """
        loss = pl_module.last_loss
        if loss is None:
            return
        value = loss.item()
        bad = not math.isfinite(value) or value > _DIVERGED * guess_loss(pl_module.num_classes)
        if trainer.world_size > 1:  # else the other processes would wait for this one
            bad = trainer.strategy.reduce_boolean_decision(bad, all=False)
        if bad:
            raise TrainingError(_message(value, trainer, pl_module))


def _message(value: float, trainer: Trainer, pl_module: FineTuner) -> str:
    recipe = pl_module.recipe
    tries = [f"a lower train.lr ({recipe.train.lr:g} now)"]
    if recipe.train.clip is None:
        tries.append("train.clip=1")
    if recipe.train.warmup_epochs < 1:
        tries.append("train.warmup_epochs=1")
    if pl_module.predictors():
        tries.append(f"dynamic.predictor_lr={recipe.dynamic.predictor_lr / 10:g}")
    if recipe.train.precision == "16-mixed":
        tries.append("train.precision=bf16-mixed or 32-true")
    where = _where(pl_module)
    checkpoint_note = (
        f"The last good checkpoint is kept in {recipe.directory}."
        if (recipe.directory / CHECKPOINT).exists()
        else "No checkpoint had been saved yet."
    )
    return (
        f"The loss is {value:.3g} at step {trainer.global_step} (epoch {trainer.current_epoch + 1}), and the run was "
        f"stopped. {where}{checkpoint_note} Try {', '.join(tries)}."
    )


@torch.no_grad()
def _where(pl_module: FineTuner) -> str:
    """Which predictors' coefficients are saturated on the last images, and which values aren't finite."""
    saturated: dict[str, float] = {}
    broken: list[str] = []

    def look(name: str, activation: str) -> Any:
        def hook(module: Any, inputs: Any, output: tuple[Mixture, ...]) -> None:
            experts = [mixture.experts.float() for mixture in output]
            factors = [axis.float() for mixture in output for axis in mixture[1:] if axis is not None]
            if not all(values.isfinite().all() for values in experts + factors):
                broken.append(name)
                return
            # Factors are doubled sigmoids.
            sigmoids = [values / 2 for values in factors] + (experts if activation == "sigmoid" else [])
            extreme = [(values < _SATURATED) | (values > 1 - _SATURATED) for values in sigmoids]
            if activation == "softmax":
                extreme += [values.amax(1) > 1 - _SATURATED for values in experts if values.shape[1] > 1]
            saturated[name] = torch.cat([values.flatten() for values in extreme]).float().mean().item()

        return hook

    handles = [
        module.register_forward_hook(look(name, module.activation)) for name, module in pl_module.predictors().items()
    ]
    try:
        pl_module.model(pl_module.last_images)
    finally:
        for handle in handles:
            handle.remove()
    text = ""
    if saturated and max(saturated.values()) > 0.05:
        name = max(saturated, key=saturated.get)
        text += f"The coefficients of {_layer(name)} are saturated: {100 * saturated[name]:.0f} % are at 0 or 1. "
    elif saturated:
        text += "No predictor's coefficients are saturated. "
    if broken:
        text += f"Those of {some([_layer(name) for name in broken], 3)} are not finite. "
    bad = [name for name, parameter in pl_module.model.named_parameters() if not torch.isfinite(parameter).all()]
    if bad:
        text += f"Weights that are not finite: {some(bad, 3)}. "
    return text


def _layer(predictor: str) -> str:
    return predictor.removesuffix(".coefficient_predictor").removesuffix(".block_predictor")
