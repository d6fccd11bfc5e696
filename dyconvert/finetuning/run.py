"""finetune(recipe): opens the run, reads the data, makes the networks, and starts the session."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dyconvert import checkpoint
from dyconvert.checkpoint.hub import check_repo
from dyconvert.console import err
from dyconvert.errors import CheckpointError, RecipeError, said_as
from dyconvert.finetuning.data.augment import preprocessing_of_data
from dyconvert.finetuning.data.datasets import Split, check_classes, load_split
from dyconvert.finetuning.data.loading import Prepared, steps_per_epoch
from dyconvert.finetuning.directory import Run, open_run
from dyconvert.finetuning.network import Networks, count_outputs, create_original, transform
from dyconvert.finetuning.recipes.recipe import Recipe
from dyconvert.finetuning.recipes.trust import check_trusted
from dyconvert.finetuning.recipes.words import KEYS
from dyconvert.finetuning.session import Report, Session
from dyconvert.finetuning.summary import Summary
from dyconvert.finetuning.training.interrupts import Interrupts
from dyconvert.finetuning.training.teacher import create_teacher
from dyconvert.finetuning.training.trainers import check_devices, is_main_process
from dyconvert.marks import mark_preprocessing
from dyconvert.run_files import LAST, PRETRAIN, RECIPE

# Pairing experts measures on so many images how far the predictors' inputs vary.
_PAIRING_IMAGES = 500


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
    summary = _open_and_run(recipe, resume, progress, trust_code)
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


def _open_and_run(recipe: Recipe, resume: bool, progress: bool, trust_code: bool) -> Summary:
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
            return _prepare_and_run(recipe, run, resume, progress, report)
    finally:
        run.close()


def _prepare_and_run(recipe: Recipe, run: Run, resume: bool, progress: bool, report: Report) -> Summary:
    original, source = create_original(recipe)
    num_classes = count_outputs(original, recipe)
    train, val = (load_split(recipe, split, num_classes, report) for split in ("train", "val"))
    check_classes(train, val, num_classes, recipe)
    if not steps_per_epoch(recipe, train):
        raise RecipeError(
            f"The {len(train)} training images don't fill one batch of {recipe.train.batch}. Set train.batch lower."
        )
    if recipe.pretrain is not None:
        # If the conversion refuses this network, it says so now, before the original is trained.
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
        return Session(recipe, run, networks, train, val, interrupts, report, progress).go()


def _pretrained(recipe: Recipe, original: nn.Module, resume: bool, progress: bool) -> nn.Module:
    """The static network, trained on the recipe's data by a run in the folder `pretrain` of the recipe's directory."""
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
    # The code that the recipe names has been checked already.
    finetune(recipe.model_copy(update=changes), resume=started, progress=progress, trust_code=True)
    return checkpoint.load(directory / LAST, model=original)


def _calibration(recipe: Recipe, split: Split) -> Callable[[], Iterator[Tensor]]:
    """Returns a function whose calls yield batches of a sample of training images, normalised and not augmented."""
    most = recipe.narrow.calibration_images if recipe.narrow is not None else _PAIRING_IMAGES
    count = min(most, len(split))
    generator = torch.Generator().manual_seed(recipe.train.seed)
    positions = torch.randperm(len(split), generator=generator)[:count].tolist()
    prepared = Prepared(split, recipe.train.seed, recipe.data, training=False)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (recipe.data.mean, recipe.data.std))

    def batches() -> Iterator[Tensor]:
        for start in range(0, count, 50):
            images, _ = prepared.collate(
                prepared.__getitems__([(0, position) for position in positions[start : start + 50]])
            )
            yield ((images / 255 if images.dtype == torch.uint8 else images) - mean) / std

    return batches


def _reporter(progress: bool) -> Report:
    if not progress or not is_main_process():
        return lambda line: None
    return lambda line: err.print(line, soft_wrap=not err.is_terminal)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences Lightning's remarks about devices, workers and the like, and restores the state of torch's generator."""
    loggers = [logging.getLogger(f"lightning.{package}") for package in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        # The run seeds torch's global generator, which the caller may use.
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
