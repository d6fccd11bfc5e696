"""A run with its data and networks in place: evaluates, trains, evaluates again, and writes the summary."""

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import nn

from dyconvert import checkpoint
from dyconvert.analysis.flops import macs, parameters
from dyconvert.errors import CheckpointError, DyconvertError
from dyconvert.finetuning.data.datasets import Split
from dyconvert.finetuning.data.loading import steps_per_epoch, train_loader, val_loader
from dyconvert.finetuning.directory import Run
from dyconvert.finetuning.network import Networks
from dyconvert.finetuning.recipes.recipe import Recipe
from dyconvert.finetuning.summary import Summary
from dyconvert.finetuning.training.checkpoints import Checkpoints, position, unreadable
from dyconvert.finetuning.training.display import Display
from dyconvert.finetuning.training.guard import DivergenceGuard
from dyconvert.finetuning.training.interrupts import Interrupted, Interrupts
from dyconvert.finetuning.training.module import METRIC, METRIC_NAMES, FineTuner
from dyconvert.finetuning.training.results import Results, make_loggers
from dyconvert.finetuning.training.schedules import Ema, Frozen, TemperatureSchedule
from dyconvert.finetuning.training.teacher import feature_distillation, score
from dyconvert.finetuning.training.teacher_cache import cached_outputs
from dyconvert.finetuning.training.trainers import is_main_process, make_trainer
from dyconvert.nn import CoefficientPredictor, DynamicConv
from dyconvert.run_files import CHECKPOINT, EMA, LAST

Report = Callable[[str], None]

# The teacher's accuracy is measured on so many validation batches, to see whether it is any good.
_TEACHER_BATCHES = 5


@dataclass
class Session:
    """A run with its data and networks in place.

    Attributes:
        train, val: the images.
        report: gets lines of progress.
        progress: whether progress is shown.
    """

    recipe: Recipe
    run: Run
    networks: Networks
    train: Split
    val: Split
    interrupts: Interrupts
    report: Report
    progress: bool

    def go(self) -> Summary:
        """Evaluate, train, evaluate, and write the summary."""
        recipe, run, networks = self.recipe, self.run, self.networks
        directory = recipe.directory
        file = directory / CHECKPOINT
        resumed = file if file.is_file() and run.before is not None else None
        if run.before is None:
            run.before = self._evaluate_before()
            if self.interrupts.requested:
                raise KeyboardInterrupt
            if is_main_process():
                run.record_before(run.before)
        self._report_before(run.before)
        sizes = self._sizes()

        ema = Ema(recipe.train.ema) if recipe.train.ema is not None else None
        guard = DivergenceGuard()
        whole = copy.deepcopy(networks.student) if recipe.train.strategy == "fsdp" else None
        display = Display(self.progress and is_main_process(), averaged=ema is not None)
        results = Results(directory, networks.source, ema, whole, self.report, display)
        callbacks = [display, guard, *self._schedules(), *([ema] if ema else []), results]
        callbacks.append(Checkpoints(file, recipe.output, guard, self.interrupts, self.report))
        epoch, done, step = position(resumed) if resumed else (0, 0, None)
        if resumed:
            self.report(f"resuming at step {step}, in epoch {epoch + 1}")
        loggers = make_loggers(recipe, step) if is_main_process() else []
        trainer = make_trainer(recipe, callbacks, loggers)
        cached = None
        if recipe.distill is not None and recipe.distill.teacher != "original":
            self._report_teacher()
        if recipe.distill is not None and recipe.distill.cache:
            cached = cached_outputs(
                recipe,
                networks.teacher,
                self.train,
                trainer.strategy.root_device,
                lambda: self.interrupts.requested,
                self.report,
            )
        module = self._module(networks.student, learning=True)
        networks.student.train()  # Lightning keeps the mode that it finds
        if recipe.train.compile:
            networks.student.compile()
        try:
            trainer.fit(
                module,
                train_loader(recipe, self.train, trainer.global_rank, trainer.world_size, epoch, done, cached),
                val_loader(recipe, self.val, trainer.global_rank, trainer.world_size),
                ckpt_path=resumed,
                weights_only=True,
            )
        except Interrupted:
            self.report(
                f"Saved at step {trainer.global_step}, in epoch {trainer.current_epoch + 1}. To continue, run it again "
                "with --resume (in Python: resume=True)."
            )
            raise KeyboardInterrupt from None
        except SystemExit:  # Lightning's answer to a second Ctrl-C
            raise KeyboardInterrupt from None
        except DyconvertError:
            raise
        except Exception as error:
            if resumed is None or results.began:
                raise
            # A checkpoint is a file, and may hold anything.
            raise unreadable(file, error) from error
        results.finish(trainer, module)
        finetuned, averaged = self._evaluate_after(trainer, module, results, ema)
        summary = Summary(
            name=recipe.name,
            directory=str(directory),
            metric=METRIC_NAMES[recipe.data.task],
            **run.before,
            finetuned=finetuned,
            ema=averaged,
            best=results.best,
            best_epoch=results.best_epoch,
            **sizes,
            images=(len(self.train), len(self.val)),
            corrupt=len(self.train.corrupt) + len(self.val.corrupt),
            epochs=trainer.global_step / module.per_epoch,
            seconds=results.elapsed(),
        )
        if is_main_process():
            self._write_cards(summary)
            summary.save()
            run.tidy()
        return summary

    def _write_cards(self, summary: Summary) -> None:
        """Write the run's accuracies into the model cards of the models that it saved."""
        directory = Path(summary.directory)
        for place, reached in (
            (directory, summary.best),
            (directory / LAST, summary.finetuned),
            (directory / EMA, summary.ema),
        ):
            if reached is None or not (place / checkpoint.DESCRIPTION).is_file():
                continue
            figures: dict[str, tuple[float, float]] = {
                f"{summary.metric}, %": (float(summary.original), float(reached)),
                "parameters": summary.parameters,
            }
            if summary.macs is not None:
                figures["MACs, one image"] = summary.macs
            try:
                checkpoint.write_card(place, figures)
            except CheckpointError as error:
                self.report(str(error))  # the run is whole without it

    def _module(self, model: nn.Module, learning: bool = False) -> FineTuner:
        recipe, networks = self.recipe, self.networks
        teacher = networks.teacher if learning else None
        features = None
        if teacher is not None and recipe.distill.features:
            features = feature_distillation(recipe, networks.original, model, teacher)
        per_epoch = steps_per_epoch(recipe, self.train)
        return FineTuner(model, recipe, networks.num_classes, per_epoch, teacher, features)

    def evaluate(self, model: nn.Module) -> float:
        """The metric of a network on the validation data, in percent."""
        trainer = make_trainer(self.recipe, [], [])
        loader = val_loader(self.recipe, self.val, trainer.global_rank, trainer.world_size)
        [metrics] = trainer.validate(self._module(model), loader, verbose=False)
        return metrics[METRIC]

    def _evaluate_before(self) -> dict[str, float | None]:
        original = self.evaluate(self.networks.original)
        changed = self.recipe.convert is not None or self.recipe.narrow is not None
        return {"original": original, "converted": self.evaluate(self.networks.student) if changed else None}

    def _report_before(self, before: dict[str, float | None]) -> None:
        metric = METRIC_NAMES[self.recipe.data.task]
        converted = "" if before["converted"] is None else f", converted {before['converted']:.2f} %"
        self.report(f"before training: {metric} {before['original']:.2f} %{converted}")

    def _report_teacher(self) -> None:
        """Report the teacher's accuracy: a wrong normalisation makes it bad without an error."""
        if self.recipe.data.task != "classification":
            return
        batches = itertools.islice(val_loader(self.recipe, self.val, 0, 1), _TEACHER_BATCHES)
        accuracy = score(self.networks.teacher, self.recipe, batches)
        self.report(
            f"the teacher, {self.recipe.distill.teacher}: top-1 {accuracy:.1f} % on the first validation images"
        )

    def _evaluate_after(
        self, trainer: Trainer, module: FineTuner, results: Results, ema: Ema | None
    ) -> tuple[float, float | None]:
        """The metrics of the last weights, and of the averaged ones."""
        epoch = -(-trainer.global_step // module.per_epoch)
        validated = results.last if results.last_step == trainer.global_step else None
        if ema is None:
            last = validated if validated is not None else self.evaluate(module.model)
            results.consider(trainer, last, module.model, epoch)
            return last, None
        averaged = validated if validated is not None else self.evaluate(ema.averaged.model)
        results.consider(trainer, averaged, ema.averaged.model, epoch)
        return self.evaluate(module.model), averaged

    def _schedules(self) -> Iterator[Any]:
        recipe = self.recipe
        if recipe.convert is None:
            return
        if recipe.dynamic.temperature is not None:
            yield TemperatureSchedule(recipe.dynamic.temperature)
        if recipe.dynamic.freeze_experts_epochs:
            yield Frozen(DynamicConv, recipe.dynamic.freeze_experts_epochs)
        if recipe.dynamic.freeze_predictors_epochs:
            yield Frozen(CoefficientPredictor, recipe.dynamic.freeze_predictors_epochs)

    def _sizes(self) -> dict[str, Any]:
        pair = (self.networks.original, self.networks.student)
        example = torch.zeros(1, *self.recipe.input_size)
        try:
            counted = tuple(macs(model, example) for model in pair)
        except Exception:  # some networks that train can't be counted
            counted = None
        return {"parameters": tuple(parameters(model) for model in pair), "macs": counted}
