"""What changes during a run, as functions of the optimizer step: learning rate, temperature, frozen experts."""

import math
from dataclasses import dataclass

from dyconvert.finetuning.schema import Dynamic, Train


@dataclass(frozen=True)
class Schedule:
    """A recipe's schedules over `total_steps` optimizer steps.

    Attributes:
        train: the recipe's section.
        dynamic: the recipe's section.
        steps_per_epoch: optimizer steps an epoch.
        epochs: of this run; `train.epochs`, or `pretrain.epochs`.
    """

    train: Train
    dynamic: Dynamic
    steps_per_epoch: int
    epochs: int

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        steps = self.steps_per_epoch * self.epochs
        return min(steps, self.train.max_steps or steps)

    def lr_factor(self, step: int) -> float:
        """Factor on the learning rate at optimizer step `step`, from 0: linear warm-up, then the schedule to zero."""
        warmup = min(round(self.train.warmup_epochs * self.steps_per_epoch), self.total_steps - 1)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = min((step - warmup) / max(self.total_steps - warmup, 1), 1.0)
        if self.train.schedule == "cosine":
            return (1 + math.cos(math.pi * done)) / 2
        return (1 - done) ** 0.9 if self.train.schedule == "poly" else 1.0

    def temperature(self, step: int) -> float | None:
        """The predictors' temperature at `step`; None where the recipe leaves it alone."""
        section = self.dynamic.temperature
        if section is None:
            return None
        done = min(step / (section.epochs * self.steps_per_epoch), 1.0)
        return section.start + (section.end - section.start) * done

    def experts_frozen(self, step: int) -> bool:
        """Whether only the predictors train, of the converted convs, at `step`."""
        return step < round(self.dynamic.freeze_experts_epochs * self.steps_per_epoch)
