"""finetune(recipe): everything from the pretrained network to the table at the end."""

import copy
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from dyconvert import checkpoint
from dyconvert.analysis.flops import macs, parameters
from dyconvert.checkpoint.hub import check_repo
from dyconvert.console import err
from dyconvert.errors import CheckpointError, DyconvertError, RecipeError, said_as
from dyconvert.finetuning.data.augment import preprocessing_of_data
from dyconvert.finetuning.data.datasets import Part, check_classes, load_part
from dyconvert.finetuning.data.loading import Prepared, steps_per_epoch, train_loader, val_loader
from dyconvert.finetuning.directory import Run, open_run
from dyconvert.finetuning.network import Networks, count_outputs, create_original, transform
from dyconvert.finetuning.recipes.recipe import Recipe
from dyconvert.finetuning.recipes.trust import check_trusted
from dyconvert.finetuning.recipes.words import KEYS
from dyconvert.finetuning.summary import Summary
from dyconvert.finetuning.training.checkpoints import Checkpoints, position, unreadable
from dyconvert.finetuning.training.display import Display
from dyconvert.finetuning.training.guard import DivergenceGuard
from dyconvert.finetuning.training.interrupts import Interrupted, Interrupts
from dyconvert.finetuning.training.module import METRIC, METRIC_NAMES, FineTuner
from dyconvert.finetuning.training.results import Results, make_loggers
from dyconvert.finetuning.training.schedules import Ema, Frozen, TemperatureSchedule
from dyconvert.finetuning.training.teacher import create_teacher, feature_distillation, score
from dyconvert.finetuning.training.teacher_cache import kept_outputs
from dyconvert.finetuning.training.trainers import check_devices, is_main_process, make_trainer
from dyconvert.marks import mark_preprocessing
from dyconvert.nn import CoefficientPredictor, DynamicConv
from dyconvert.run_files import CHECKPOINT, EMA, LAST, PRETRAIN, RECIPE

Report = Callable[[str], None]

# To see how far the predictors' inputs vary from image to image.
_PAIRING_IMAGES = 500
# Enough images to see whether a teacher is any good.
_TEACHER_BATCHES = 5


def finetune(
    recipe: Recipe,
    *,
    resume: bool = False,
    progress: bool = True,
    trust_code: bool = False,
    push_to: str | None = None,
) -> Summary:
    """Convert a model and fine-tune it; `dyconvert.finetune` documents it."""
    if push_to is not None:
        check_repo(push_to)
    summary = _finished(recipe, resume, progress, trust_code)
    if push_to is not None and is_main_process():
        push_run(recipe, push_to)
    return summary


def push_run(recipe: Recipe, repo: str) -> str:
    """Put the best model of a finished run onto the Hub, and return its address.

    Raises:
        CheckpointError: the Hub can't be written to. The run is whole without it.
    """
    try:
        return checkpoint.push(recipe.directory, repo)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} The run is finished, in {recipe.directory}: `dyconvert push {recipe.directory} {repo}` tries "
            "again."
        ) from error


def _finished(recipe: Recipe, resume: bool, progress: bool, trust_code: bool) -> Summary:
    check_trusted(recipe, trust_code)
    report = _reporter(progress)
    check_devices(recipe)
    run = open_run(recipe, resume)
    try:
        if run.finished is not None:
            if is_main_process():
                run.tidy()
            report(f"{recipe.directory} holds this run, finished")
            return run.finished
        with _quiet(), said_as(KEYS):
            return _run(recipe, run, resume, progress, report)
    finally:
        run.close()


def _run(recipe: Recipe, run: Run, resume: bool, progress: bool, report: Report) -> Summary:
    original, source = create_original(recipe)
    num_classes = count_outputs(original, recipe)
    train, val = (load_part(recipe, part, num_classes, report) for part in ("train", "val"))
    check_classes(train, val, num_classes, recipe)
    if not steps_per_epoch(recipe, train):
        raise RecipeError(
            f"The {len(train)} training images don't fill one batch of {recipe.train.batch}. Set train.batch lower."
        )
    if recipe.pretrain is not None:
        # What the conversion refuses is said before the original is trained.
        transform(original, recipe)
    if is_main_process():
        run.begin()
    with Interrupts(report) as interrupts:
        if recipe.pretrain is not None:
            original = _pretrained(recipe, original, resume, progress)
        networks = Networks(
            original,
            source,
            transform(original, recipe, _calibration(recipe, train)),
            num_classes,
            create_teacher(recipe, original, num_classes),
        )
        if recipe.data.task == "classification":
            mark_preprocessing(networks.student, preprocessing_of_data(recipe, val.images.classes))
        return _Session(recipe, run, networks, train, val, interrupts, report, progress).go()


@dataclass
class _Session:
    """A run with all that it needs in place."""

    recipe: Recipe
    run: Run
    networks: Networks
    train: Part
    val: Part
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
            run.before = self._before()
            if self.interrupts.requested:
                raise KeyboardInterrupt
            if is_main_process():
                run.keep(run.before)
        self._say_before(run.before)
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
        kept = None
        if recipe.distill is not None and recipe.distill.teacher != "original":
            self._say_teacher()
        if recipe.distill is not None and recipe.distill.cache:
            kept = kept_outputs(
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
                train_loader(recipe, self.train, trainer.global_rank, trainer.world_size, epoch, done, kept),
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
            # Somebody's file: it may hold anything.
            raise unreadable(file, error) from error
        results.finish(trainer, module)
        finetuned, averaged = self._after(trainer, module, results, ema)
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
        [found] = trainer.validate(self._module(model), loader, verbose=False)
        return found[METRIC]

    def _before(self) -> dict[str, float | None]:
        original = self.evaluate(self.networks.original)
        changed = self.recipe.convert is not None or self.recipe.narrow is not None
        return {"original": original, "converted": self.evaluate(self.networks.student) if changed else None}

    def _say_before(self, before: dict[str, float | None]) -> None:
        metric = METRIC_NAMES[self.recipe.data.task]
        converted = "" if before["converted"] is None else f", converted {before['converted']:.2f} %"
        self.report(f"before training: {metric} {before['original']:.2f} %{converted}")

    def _say_teacher(self) -> None:
        """A wrong normalisation makes a teacher bad, and no error."""
        if self.recipe.data.task != "classification":
            return
        batches = itertools.islice(val_loader(self.recipe, self.val, 0, 1), _TEACHER_BATCHES)
        found = score(self.networks.teacher, self.recipe, batches)
        self.report(f"the teacher, {self.recipe.distill.teacher}: top-1 {found:.1f} % on the first validation images")

    def _after(
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
        except Exception:  # any network trains; not every one can be counted
            counted = None
        return {"parameters": tuple(parameters(model) for model in pair), "macs": counted}


def _pretrained(recipe: Recipe, original: nn.Module, resume: bool, progress: bool) -> nn.Module:
    """The static network, trained on the recipe's data first; its run is in `pretrain` below the result."""
    ours = recipe.pretrain
    directory = recipe.directory / PRETRAIN
    changes = {
        "name": "pretrain",
        "pretrain": None,
        "convert": None,
        "narrow": None,
        "distill": None,
        "train": recipe.train.model_copy(update={"epochs": ours.epochs, "lr": ours.lr, "ema": None, "max_steps": None}),
        "output": recipe.output.model_copy(update={"directory": str(directory)}),
    }
    started = resume and (directory / RECIPE).is_file()
    # What the recipe names was looked at before.
    finetune(recipe.model_copy(update=changes), resume=started, progress=progress, trust_code=True)
    return checkpoint.load(directory / LAST, model=original)


def _calibration(recipe: Recipe, part: Part) -> Callable[[], Iterator[Tensor]]:
    """Batches of training images as the network takes them, without augmentation, a sample of all; each call's anew."""
    wanted = recipe.narrow.calibration_images if recipe.narrow is not None else _PAIRING_IMAGES
    count = min(wanted, len(part))
    generator = torch.Generator().manual_seed(recipe.train.seed)
    positions = torch.randperm(len(part), generator=generator)[:count].tolist()
    prepared = Prepared(part, recipe.train.seed, recipe.data, training=False)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (recipe.data.mean, recipe.data.std))

    def batches() -> Iterator[Tensor]:
        for start in range(0, count, 50):
            images, _ = prepared.collate(prepared.__getitems__([(0, each) for each in positions[start : start + 50]]))
            yield ((images / 255 if images.dtype == torch.uint8 else images) - mean) / std

    return batches


def _reporter(progress: bool) -> Report:
    if not progress or not is_main_process():
        return lambda line: None
    return lambda line: err.print(line, soft_wrap=not err.is_terminal)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's remarks about devices, workers and the like, and a trace in torch's generator."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        # The run seeds torch's generator, which is the caller's.
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
