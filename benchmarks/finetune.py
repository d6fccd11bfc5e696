"""What the engine costs: a step of a fine-tuning recipe against a bare loop over tensors, and how fast images come.

`OMP_NUM_THREADS=1 python benchmarks/finetune.py` (no data or download needed; about four minutes on one core)

Both train the network of a shipped recipe with its settings, in batches of 128: tiny-resnet8 (DyNet, g = 6) and
cifar10-narrow (ResNet-20 at half width, DyNet, g = 6, taught by kept outputs). The bare loop indexes tensors in memory,
normalises, computes the losses, and steps SGD with its parameter groups, schedule and clipping: no loader, no
augmentation, no Lightning, no checks, no log. Rounds alternate, each with a new network, and time all steps but the
first few, which find their kernels and memory. On the CPU, the process's CPU time is compared as well: it doesn't
depend on what else the machine does.

Then images a second, cropped and flipped as the recipe says: as batches, and one by one, as folders of images too
large for memory go, here without reading them.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import nn

from dyconvert import Recipe, load_recipe
from dyconvert.finetuning import run
from dyconvert.finetuning.data.datasets import Split, load_split
from dyconvert.finetuning.data.loading import train_loader
from dyconvert.finetuning.network import create_original, transform
from dyconvert.finetuning.training.module import distillation
from dyconvert.finetuning.training.optim import lr_factor, make_optimizer

WARM_UP = 3


class Clock:
    """Seconds of wall and CPU time from step to step."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def tick(self) -> None:
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def medians(self) -> tuple[float, float]:
        """Of the steps after the first few."""
        return statistics.median(_steps(self.wall)), statistics.median(_steps(self.cpu))


def _steps(times: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(times[WARM_UP:])]


def bare(recipe: Recipe, part: Split, original: nn.Module, clock: Clock) -> None:
    """The loop that one writes by hand."""
    student = changed(original, recipe).train()
    optimizer = make_optimizer(student, recipe.train, recipe.dynamic)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor(recipe.train, len(part), 100))
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (recipe.data.mean, recipe.data.std))
    distill = recipe.distill
    images, targets = part.stacked
    taught = torch.randn(len(images), 10)
    for chosen in torch.randperm(len(images)).split(recipe.train.batch):
        batch = (images[chosen].float().div_(255) - mean) / std
        logits = student(batch)
        loss = F.cross_entropy(logits, targets[chosen])
        if distill is not None:
            soft = distillation(logits, taught[chosen], distill.temperature)
            loss = (1 - distill.weight) * loss + distill.weight * soft
        optimizer.zero_grad()
        loss.backward()
        if recipe.train.clip is not None:
            nn.utils.clip_grad_norm_(student.parameters(), recipe.train.clip)
        optimizer.step()
        schedule.step()
        clock.tick()


def changed(original: nn.Module, recipe: Recipe) -> nn.Module:
    """Narrowed and converted; what that takes of images doesn't matter here."""
    return transform(original, recipe, lambda: iter([torch.rand(8, *recipe.input_size)]))


class Ticks(Callback):
    """Ticks after each step, when everything of it is done."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_end(self, *arguments: object) -> None:
        self.clock.tick()


def engine(recipe: Recipe, clock: Clock) -> None:
    """`dyconvert.finetune`, watched."""
    make = run.make_trainer

    def watched(recipe: Recipe, callbacks: list, *rest: object) -> object:
        return make(recipe, [*callbacks, Ticks(clock)] if callbacks else callbacks, *rest)

    run.make_trainer = watched
    try:
        run.finetune(recipe, progress=False)
    finally:
        run.make_trainer = make


def images_a_second(recipe: Recipe, part: Split) -> dict[str, float]:
    """Of the loader, with images in memory."""
    found = {}
    for name in ("as batches", "one by one"):
        loader = train_loader(recipe, part, 0, 1)
        if name == "one by one":
            loader.dataset.views = None
        began = time.process_time()
        count = sum(len(targets) for _, targets in loader)
        found[name] = count / (time.process_time() - began)
    return found


def measure(name: str, rounds: int, steps: int, overrides: list[str]) -> None:
    """Print what one recipe's steps take."""
    walls: dict[str, list[float]] = {"bare loop": [], "engine": []}
    cpus: dict[str, list[float]] = {"bare loop": [], "engine": []}
    for index in range(rounds):
        with tempfile.TemporaryDirectory() as place:
            given = [
                "model.weights=none",
                "data.dataset=fake",
                f"data.images={128 * steps}",
                "data.limit_val=128",
                "train.epochs=1",
                "train.devices=1",
                f"output.directory={place}/run",
            ]
            recipe = load_recipe(name, [*given, *overrides])
            if recipe.narrow is not None:
                recipe = load_recipe(name, [*given, "narrow.init=merge", *overrides])
            if recipe.distill is not None:
                recipe.distill.cache_directory = f"{place}/teachers"
            original, _ = create_original(recipe)
            part = load_split(recipe, "train", 10, lambda line: None)
            ways: dict[str, Callable[[Clock], None]] = {
                "bare loop": partial(bare, recipe, part, original),
                "engine": partial(engine, recipe),
            }
            for way in ways if index % 2 == 0 else reversed(ways):
                clock = Clock()
                ways[way](clock)
                wall, cpu = clock.medians()
                walls[way].append(wall)
                cpus[way].append(cpu)
        print(f"{name}: round {index + 1} of {rounds}", file=sys.stderr)
    print(name)
    for title, times in (("seconds a step", walls), ("CPU seconds a step", cpus)):
        for way, found in times.items():
            print(f"{title:>20}  {way:<10} {statistics.median(found):.4f}  ({min(found):.4f} .. {max(found):.4f})")
        ratios = [a / b for a, b in zip(times["engine"], times["bare loop"], strict=True)]
        print(f"{'':>20}  ratio      {statistics.median(ratios):.3f}  ({min(ratios):.3f} .. {max(ratios):.3f})")
    for way, speed in images_a_second(load_recipe(name, [*given, *overrides, "distill=null"]), part).items():
        print(f"{'images a second':>20}  {way:<10} {speed:,.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="*", default=["tiny-resnet8", "cifar10-narrow"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("overrides", nargs="*", help="of the recipe, such as convert=null or distill=null")
    arguments = parser.parse_args()
    for name in arguments.recipes:
        measure(name, arguments.rounds, arguments.steps, arguments.overrides)


if __name__ == "__main__":
    main()
