"""Shows what a recipe would do, without training or writing: its model (on the meta device), plan and schedule."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import nn

from dyconvert import models
from dyconvert.analysis.flops import macs, parameters
from dyconvert.console import count
from dyconvert.errors import RecipeError, said_as
from dyconvert.finetuning.recipes.recipe import Recipe
from dyconvert.finetuning.recipes.trust import check_trusted
from dyconvert.finetuning.recipes.words import KEYS
from dyconvert.models.source import names_file
from dyconvert.surgery.blocks import check_convertible
from dyconvert.surgery.convert import plan as plan_model
from dyconvert.surgery.convert import preview as preview_model
from dyconvert.surgery.plan import Plan

# Steps of an epoch for the schedule, if the data is missing.
_STEPS_OF_AN_EPOCH = 1000


@dataclass
class DryRun:
    """A recipe, resolved.

    Attributes:
        recipe: complete, with its defaults.
        plan: the plan of every conv; None if nothing is converted.
        figures: parameters, and MACs of one image, of the "original" and the "converted" model.
        images: numbers of "train" and "val" images; empty if the data isn't there.
        steps, steps_per_epoch: optimizer steps of the run and of an epoch; None if unknown.
        missing: why the data can't be read; None if it can.
    """

    recipe: Recipe
    plan: Plan | None
    figures: dict[str, tuple[int, int]]
    images: dict[str, int]
    steps: int | None
    steps_per_epoch: int | None
    missing: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "plan": self.plan.model_dump(mode="json") if self.plan else None,
            "figures": {name: {"parameters": p, "macs": m} for name, (p, m) in self.figures.items()},
            "images": self.images or None,
            "missing": self.missing,
            "steps": self.steps,
            "schedule": self._milestones(),
        }

    def _milestones(self) -> list[dict[str, float | bool | None]]:
        """The schedule at the start of about ten epochs, after the warm-up, and at the last step."""
        from dyconvert.finetuning.training.optim import lr_factor
        from dyconvert.finetuning.training.schedules import TemperatureSchedule

        train, dynamic = self.recipe.train, self.recipe.dynamic
        # The schedule depends on the epoch only, so if the data is missing, any number of steps per epoch shows it.
        per = self.steps_per_epoch or _STEPS_OF_AN_EPOCH
        total = self.steps if self.steps is not None else per * train.epochs
        factor = lr_factor(train, total, per)
        temperature = dynamic.temperature and TemperatureSchedule(dynamic.temperature)
        epochs = max(total // per, 1)
        steps = {epoch * per for epoch in range(0, epochs, max(epochs // 10, 1))}
        steps |= {total - 1, min(round(train.warmup_epochs * per), total - 1)}
        return [
            {
                "epoch": step / per,
                "step": step if self.steps is not None else None,
                "lr": train.lr * factor(step),
                "temperature": temperature.at(step / per) if temperature else None,
                "experts_frozen": step / per < dynamic.freeze_experts_epochs,
            }
            for step in sorted(steps)
        ]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.plan is not None:
            yield self.plan.table()
            yield ""
        yield Text(self.recipe.name, style="bold")
        facts = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        for name, fact in self._facts():
            facts.add_row(name, fact)
        yield facts
        yield ""
        figures = Table(box=None, pad_edge=False, header_style="bold")
        for title in ("", *self.figures):
            figures.add_column(title, justify="right" if title else "left")
        for index, title in enumerate(("parameters", "MACs, one image")):
            figures.add_row(title, *(count(numbers[index]) for numbers in self.figures.values()))
        yield figures
        yield ""
        yield self._schedule()

    def _facts(self) -> Iterator[tuple[str, str]]:
        recipe, train = self.recipe, self.recipe.train
        yield "model", f"{recipe.model.specifier}, weights {recipe.model.weights}"
        if self.missing is None:
            yield "data", f"{recipe.data.dataset}, {self.images['train']:,} images, {self.images['val']:,} to validate"
        else:
            yield "data", f"{recipe.data.dataset}, which isn't there. {self.missing}"
        if recipe.pretrain is not None:
            yield "pretrain", f"the static network, {recipe.pretrain.epochs} epochs from lr {recipe.pretrain.lr:g}"
        if recipe.narrow is not None:
            target = (
                f"width {recipe.narrow.width:g}" if recipe.narrow.width else f"{recipe.narrow.flops:.1%} of the MACs"
            )
            yield "narrow", f"to {target} by {recipe.narrow.init}; the figures below are those of the full width"
        if self.plan is None:
            yield "convert", "nothing: static fine-tuning"
        else:
            yield "convert", f"{self.plan.method.name}, g = {self.plan.method.g}\n{self.plan.summary()}"
        if recipe.distill is not None:
            teacher = "the original" if recipe.distill.teacher == "original" else recipe.distill.teacher
            yield "distill", f"from {teacher}, weight {recipe.distill.weight:g}"
        steps = f"{train.epochs} epochs" if self.steps is None else f"{self.steps:,} steps"
        yield (
            "train",
            f"{steps}, {train.batch} images a step; {train.optimizer}, {train.schedule}",
        )
        yield "output", str(recipe.directory)

    def _schedule(self) -> Table:
        rows = self._milestones()
        frozen = self.plan is not None and any(row["experts_frozen"] for row in rows)
        annealed = self.plan is not None and self.recipe.dynamic.temperature is not None
        table = Table(box=None, pad_edge=False, header_style="bold")
        counted = self.steps is not None
        for title in (
            "epoch",
            *["step"] * counted,
            "learning rate",
            *["temperature"] * annealed,
            *["experts"] * frozen,
        ):
            table.add_column(title, justify="right")
        for row in rows:
            cells = [f"{row['epoch']:.1f}", *([f"{row['step']:,}"] if counted else []), f"{row['lr']:.2g}"]
            cells += [f"{row['temperature']:.1f}"] if annealed else []
            cells += ["frozen" if row["experts_frozen"] else "train"] if frozen else []
            table.add_row(*cells)
        return table


def preview(recipe: Recipe, report: Callable[[str], None] = lambda line: None, trust_code: bool = False) -> DryRun:
    """Resolve everything that a run needs, without weights, training or writing.

    Args:
        report: gets a line if reading takes a while.
        trust_code: run code of the recipe's own, which builds the model.

    Raises:
        RecipeError: the weights are missing, or they or the data don't fit the recipe. Missing data is no error:
            `missing` says so.
        ModelError, PlanError: the model can't be built or converted.
    """
    check_trusted(recipe, trust_code)
    with said_as(KEYS):
        return _previewed(recipe, report)


def _previewed(recipe: Recipe, report: Callable[[str], None]) -> DryRun:
    from dyconvert.finetuning.data.datasets import check_classes, load_split
    from dyconvert.finetuning.data.loading import steps_per_epoch
    from dyconvert.finetuning.network import count_outputs

    section = recipe.model
    if names_file(section.weights) and not Path(section.weights).expanduser().is_file():
        raise RecipeError(f"There is no weights file {section.weights} (model.weights).")
    source = models.Source(section.specifier, section.arguments, section.weights, None, section.num_classes)
    model = models.build(source)
    check_convertible(model)
    example = (torch.zeros(2, *recipe.input_size),)
    classes = count_outputs(model, recipe)
    figures = {"original": _figures(model, recipe)}
    plan = None
    if recipe.convert is not None:
        plan = plan_model(model, **recipe.convert.model_dump(), example=example)
        figures["converted"] = _figures(preview_model(model, plan), recipe)
    try:
        splits = {split: load_split(recipe, split, classes, report) for split in ("train", "val")}
    except RecipeError as error:
        if recipe.data_root is not None and any(recipe.data_root.glob("*")):
            raise  # the data is there, but isn't what the recipe says
        return DryRun(recipe, plan, figures, {}, None, None, str(error))
    check_classes(splits["train"], splits["val"], classes, recipe)
    images = {split: len(loaded) for split, loaded in splits.items()}
    per_epoch = steps_per_epoch(recipe, splits["train"])
    if not per_epoch:
        raise RecipeError(f"{images['train']} training images are less than a batch of {recipe.train.batch}.")
    steps = per_epoch * recipe.train.epochs
    return DryRun(recipe, plan, figures, images, min(steps, recipe.train.max_steps or steps), per_epoch)


def _figures(model: nn.Module, recipe: Recipe) -> tuple[int, int]:
    return parameters(model), macs(model, torch.zeros(1, *recipe.input_size))
