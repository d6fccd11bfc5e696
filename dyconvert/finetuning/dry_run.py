"""What a recipe would do: the model on the meta device, its plan, and the schedule; nothing is trained or written."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text
from torch import nn

from dyconvert import models
from dyconvert.analysis.flops import macs, parameters
from dyconvert.errors import RecipeError
from dyconvert.finetuning.recipe import Recipe
from dyconvert.finetuning.schedule import Schedule
from dyconvert.models.weights import names_file
from dyconvert.surgery.blocks import check_convertible
from dyconvert.surgery.convert import plan as plan_model
from dyconvert.surgery.convert import preview as preview_model
from dyconvert.surgery.observe import on_meta
from dyconvert.surgery.plan import Plan


@dataclass
class DryRun:
    """A recipe, resolved.

    Attributes:
        recipe: complete, with its defaults.
        plan: of every conv; None where nothing is converted.
        figures: parameters and MACs of one image, of the "original" and the "converted" model.
        images: "train" and "val": numbers of images.
        schedule: learning rate and temperature by step.
        notes: what a dry run can't say, and why.
    """

    recipe: Recipe
    plan: Plan | None
    figures: dict[str, tuple[int, int]]
    images: dict[str, int]
    schedule: Schedule
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "plan": self.plan.model_dump(mode="json") if self.plan else None,
            "figures": {name: {"parameters": p, "macs": m} for name, (p, m) in self.figures.items()},
            "images": self.images,
            "steps": self.schedule.total_steps,
            "schedule": self._milestones(),
            "notes": self.notes,
        }

    def _milestones(self) -> list[dict[str, float | bool | None]]:
        """The schedule at the start of about ten epochs, and at the last step."""
        per, total = self.schedule.steps_per_epoch, self.schedule.total_steps
        whole = max(total // per, 1)
        steps = {epoch * per for epoch in range(0, whole, max(whole // 10, 1))} | {total - 1}
        warmup = round(self.recipe.train.warmup_epochs * per)
        return [
            {
                "epoch": step / per,
                "step": step,
                "lr": self.recipe.train.lr * self.schedule.lr_factor(step),
                "temperature": self.schedule.temperature(step),
                "experts_frozen": self.schedule.experts_frozen(step),
            }
            for step in sorted(steps | ({warmup} if warmup < total else set()))
        ]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        recipe, train = self.recipe, self.recipe.train
        if self.plan is not None:
            yield self.plan.table()
            yield ""
        yield Group(
            Text(recipe.name, style="bold"),
            Text(f"model       {recipe.model.specifier}, weights {recipe.model.weights}"),
            Text(
                f"data        {recipe.data.dataset}: {self.images['train']:,} images, {self.images['val']:,} to validate"
            ),
        )
        if recipe.pretrain is not None:
            yield Text(
                f"pretrain    the static network, {recipe.pretrain.epochs} epochs from lr {recipe.pretrain.lr:g}"
            )
        if self.plan is None:
            yield Text("convert     nothing: static fine-tuning")
        else:
            yield Text(f"convert     {self.plan.method.name}, g = {self.plan.method.g}")
            yield Text(self.plan.summary())
        figures = Table(box=None, pad_edge=False, header_style="bold")
        for title in ("", *self.figures):
            figures.add_column(title, justify="right" if title else "left")
        for index, title in enumerate(("parameters", "MACs, one image")):
            figures.add_row(title, *(_count(numbers[index]) for numbers in self.figures.values()))
        yield ""
        yield figures
        yield ""
        frozen = any(each["experts_frozen"] for each in self._milestones())
        dynamic = self.plan is not None and recipe.dynamic.temperature is not None
        table = Table(box=None, pad_edge=False, header_style="bold")
        for title in ("epoch", "step", "learning rate", *["temperature"] * dynamic, *["experts"] * frozen):
            table.add_column(title, justify="right")
        for each in self._milestones():
            cells = [f"{each['epoch']:.1f}", f"{each['step']:,}", f"{each['lr']:.2g}"]
            cells += [f"{each['temperature']:.1f}"] if dynamic else []
            cells += ["frozen" if each["experts_frozen"] else "train"] if frozen else []
            table.add_row(*cells)
        yield Text(
            f"schedule    {self.schedule.total_steps:,} steps of {train.batch} images; "
            f"{train.optimizer}, {train.schedule}"
        )
        yield table
        yield ""
        if recipe.distill is not None:
            yield Text(f"distill     from the {recipe.distill.teacher}, weight {recipe.distill.weight:g}")
        yield Text(f"output      {recipe.directory}")
        for note in self.notes:
            yield Text(note)


def preview(recipe: Recipe) -> DryRun:
    """Resolve everything that a run needs, without weights, training or writing.

    Raises:
        RecipeError: the data or the weights aren't there, or don't fit the recipe.
        ModelError, PlanError: the model can't be built or converted.
    """
    from dyconvert.finetuning.data_sources import open_images

    section = recipe.model
    if names_file(section.weights) and not Path(section.weights).expanduser().is_file():
        raise RecipeError(f"There is no weights file {section.weights} (model.weights).")
    source = models.Source(section.specifier, section.arguments, section.weights, None, section.num_classes)
    model = models.build(source)
    check_convertible(model)
    example = (torch.zeros(2, *recipe.input_size),)
    classes = _outputs(model, example)
    limits = {"train": recipe.data.limit_train, "val": recipe.data.limit_val}
    images = {}
    for part, limit in limits.items():
        count = len(open_images(recipe, part, classes))
        images[part] = min(count, limit or count)
    figures = {"original": _figures(model, recipe)}
    plan, notes = None, []
    if recipe.convert is not None:
        plan = plan_model(model, **recipe.convert.model_dump(), example=example)
        figures["converted"] = _figures(preview_model(model, plan), recipe)
    if recipe.narrow is not None:
        target = f"width {recipe.narrow.width}" if recipe.narrow.width else f"{recipe.narrow.flops:.0%} of the MACs"
        notes.append(f"narrow      to {target}, before the conversion; the figures are those of the full width")
    steps = max(images["train"] // recipe.train.batch, 1)
    return DryRun(
        recipe, plan, figures, images, Schedule(recipe.train, recipe.dynamic, steps, recipe.train.epochs), notes
    )


def _outputs(model: nn.Module, example: tuple[torch.Tensor]) -> int:
    """Number of classes that the model tells apart."""
    with torch.no_grad():
        output = on_meta(model)(example[0].to("meta"))
    # Torchvision's segmentation models return a dict.
    output = output["out"] if isinstance(output, dict) else output
    return output.shape[1]


def _figures(model: nn.Module, recipe: Recipe) -> tuple[int, int]:
    return parameters(model), macs(model, torch.zeros(1, *recipe.input_size))


def _count(number: float) -> str:
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:.0f}"
