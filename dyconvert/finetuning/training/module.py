"""The training step as a Lightning module: losses, distillation, mixing of images, and the metric."""

import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex
from torchvision.transforms import v2

from dyconvert.finetuning.data.loading import IGNORED
from dyconvert.finetuning.recipes.recipe import Recipe
from dyconvert.finetuning.training.optim import lr_factor, make_optimizer
from dyconvert.finetuning.training.outputs import outputs_of, reading
from dyconvert.finetuning.training.randomness import seed_of
from dyconvert.finetuning.training.teacher import FeatureDistillation, Taught, Teacher, distillation
from dyconvert.nn import CoefficientPredictor

# The logged metric, which chooses the best weights.
METRIC = "val_metric"
METRIC_NAMES = {"classification": "top-1", "segmentation": "mIoU"}


class FineTuner(LightningModule):
    """A network and how a recipe trains it.

    Args:
        model: the network that trains.
        num_classes: outputs of the network.
        steps_per_epoch: optimizer steps.
        teacher: None if the recipe doesn't distill. It doesn't run on batches that include its cached outputs.
        features: None if features aren't distilled.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        num_classes: int,
        steps_per_epoch: int,
        teacher: Teacher | None = None,
        features: FeatureDistillation | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe
        self.num_classes = num_classes
        self.per_epoch = steps_per_epoch
        self.teacher, self.features = teacher, features
        data, train = recipe.data, recipe.train
        self.segmentation = data.task == "segmentation"
        self.ignored = data.ignore_index if self.segmentation else IGNORED
        self.register_buffer("mean", torch.tensor(data.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(data.std).view(-1, 1, 1), persistent=False)
        mixes = []
        if train.mixup:
            mixes.append(v2.MixUp(alpha=train.mixup, num_classes=num_classes))
        if train.cutmix:
            mixes.append(v2.CutMix(alpha=train.cutmix, num_classes=num_classes))
        self.mixing = v2.RandomChoice(mixes) if mixes else None
        if self.segmentation:
            self.metric: Metric = MulticlassJaccardIndex(num_classes, ignore_index=data.ignore_index)
        else:
            self.metric = MulticlassAccuracy(num_classes, average="micro", ignore_index=IGNORED)
        # For the guard. The loss stays a tensor: reading it from a GPU would wait for the step.
        self.last_loss: Tensor | None = None
        self.last_images: Tensor | None = None
        # The sum of the losses of this epoch's batches so far, and their number.
        self._loss_sum: Tensor | float = 0.0
        self._loss_count = 0

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        steps = self.recipe.train.epochs * self.per_epoch
        return min(steps, self.recipe.train.max_steps or steps)

    @property
    def epochs_done(self) -> float:
        """Epochs done so far, with fractions."""
        return self.global_step / self.per_epoch

    def on_fit_start(self) -> None:
        if self.teacher is not None:
            self.teacher.to(self.device)

    @property
    def mean_loss(self) -> float:
        """Mean loss of this epoch so far, over all processes; every process must call it, because it reduces."""
        mean = torch.as_tensor(self._loss_sum, device=self.device) / max(self._loss_count, 1)
        return float(self.trainer.strategy.reduce(mean, reduce_op="mean"))

    def on_train_epoch_start(self) -> None:
        self._loss_sum, self._loss_count = 0.0, 0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["epoch_loss"] = (float(self._loss_sum), self._loss_count)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._loss_sum, self._loss_count = checkpoint["epoch_loss"]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Dropout, drop-path and mixing of images draw from this seed: a resumed run draws as an uninterrupted one.
        torch.manual_seed(seed_of(self.recipe.train.seed, 1, self.current_epoch, batch_idx, self.global_rank))

    def normalized(self, images: Tensor) -> Tensor:
        """Normalise images of uint8, or floats of 0 to 1, for the network."""
        if images.dtype == torch.uint8:
            images = images.to(self.mean.dtype).div_(255)
        images = (images - self.mean) / self.std
        return images.contiguous(memory_format=torch.channels_last) if self.recipe.train.channels_last else images

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        images, targets, *cached = batch
        images = self.normalized(images)
        if self.mixing is not None:
            images, targets = self.mixing(images, targets)
        with reading(self.features.head_in(self.model)) if self.features else nullcontext() as read:
            main, *auxiliary = outputs_of(self.model(images))
        loss = self._cross_entropy(main, targets)
        distill = self.recipe.distill
        if distill is not None and self.teacher is not None:
            taught = Taught(*cached) if cached else self.teacher(images)
            soft = distillation(main, taught.logits, distill.temperature)
            loss = (1 - distill.weight) * loss + distill.weight * soft
            if self.features:
                loss = loss + distill.features * self.features(read[0], taught.features)
        for logits in auxiliary:
            loss = loss + self.recipe.train.aux_weight * self._cross_entropy(logits, targets)
        self.last_loss, self.last_images = loss.detach(), images
        self._loss_sum = self._loss_sum + self.last_loss
        self._loss_count += 1
        self.log("loss", self.last_loss, prog_bar=True)
        return loss

    def _cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        # Mixed targets are probabilities, where no class is ignored.
        ignore = self.ignored if not targets.is_floating_point() else IGNORED
        return F.cross_entropy(
            logits.float(), targets, label_smoothing=self.recipe.train.label_smoothing, ignore_index=ignore
        )

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, targets = batch
        logits = next(outputs_of(self.model(self.normalized(images))))
        self.metric.update(logits.argmax(1), targets)

    def on_validation_epoch_end(self) -> None:
        self.log(METRIC, 100 * self.metric.compute())
        self.metric.reset()

    def on_train_epoch_end(self) -> None:
        self.log("epoch_loss", self.mean_loss)
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        for predictor in list(self.predictors().values())[:1]:
            self.log("temperature", predictor.temperature)

    def configure_optimizers(self) -> Any:
        trained = self.model if self.features is None else nn.ModuleList([self.model, self.features])
        optimizer = make_optimizer(trained, self.recipe.train, self.recipe.dynamic)
        factor = lr_factor(self.recipe.train, self.total_steps, self.per_epoch)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def predictors(self) -> dict[str, CoefficientPredictor]:
        """The network's predictors, by name."""
        return {name: module for name, module in self.model.named_modules() if isinstance(module, CoefficientPredictor)}


def guess_loss(num_classes: int) -> float:
    """The loss of a network that guesses."""
    return math.log(max(num_classes, 2))
