"""Lightning callbacks: the temperature's schedule, freezing of experts or predictors, and the moving average."""

from typing import Any, cast

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, WeightAveraging
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dyconvert.finetuning.recipes.schema import Temperature
from dyconvert.finetuning.training.lightning_internals import averaged_module
from dyconvert.finetuning.training.module import FineTuner
from dyconvert.nn import CoefficientPredictor


class TemperatureSchedule(Callback):
    """The predictors' temperature falls linearly, step by step, then stays (Chen et al. 2020, section 3.3).

    While it is high the coefficients are nearly equal and every expert learns; as it falls they may differ.
    """

    def __init__(self, schedule: Temperature) -> None:
        self.schedule = schedule

    def at(self, epochs: float) -> float:
        """The temperature after this many epochs."""
        done = min(epochs / self.schedule.epochs, 1.0)
        return self.schedule.start + (self.schedule.end - self.schedule.start) * done

    def on_train_batch_start(self, trainer: Trainer, pl_module: FineTuner, *args: Any) -> None:
        temperature = self.at(pl_module.epochs_done)
        for predictor in pl_module.predictors().values():
            predictor.temperature.fill_(temperature)


class Frozen(Callback):
    """Freezes the experts, or the predictors, for the first epochs.

    Their gradients are computed and dropped: DDP needs all parameters that require a gradient to get one.

    Args:
        kind: DynamicConv for experts, CoefficientPredictor for predictors.
    """

    def __init__(self, kind: type[nn.Module], epochs: float) -> None:
        self.kind, self.epochs = kind, epochs

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: FineTuner, optimizer: Any) -> None:
        if pl_module.epochs_done >= self.epochs:
            return
        for module in pl_module.model.modules():
            if isinstance(module, self.kind):
                # A conv may hold its own predictor.
                for parameter in module.parameters(recurse=self.kind is CoefficientPredictor):
                    parameter.grad = None


class Ema(WeightAveraging):
    """Lightning's moving average, but with the network's own temperature: an average of it would lag behind."""

    def __init__(self, decay: float) -> None:
        super().__init__(multi_avg_fn=get_ema_multi_avg_fn(decay))

    @property
    def averaged(self) -> FineTuner:
        """The module with the averaged weights."""
        return cast(FineTuner, averaged_module(self))

    def on_train_batch_end(self, trainer: Trainer, pl_module: FineTuner, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        current = pl_module.predictors()
        for name, predictor in self.averaged.predictors().items():
            predictor.temperature.copy_(current[name].temperature)

    def on_train_end(self, trainer: Trainer, pl_module: FineTuner) -> None:
        """Keep the network's own weights, which Lightning would replace by the average: both are reported."""
