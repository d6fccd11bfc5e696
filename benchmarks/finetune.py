"""What the engine costs: a step of a fine-tuning recipe against a bare loop over the same network and data.

`OMP_NUM_THREADS=1 python benchmarks/finetune.py` (no data or download needed; about ten minutes on one core)

Both train ResNet-20 for CIFAR-10's images with the shipped recipe's settings: DyNet with g = 6, distillation from
the original, batches of 128, augmentation, SGD with its parameter groups, the schedule, and clipping. The bare loop
has nothing else: no Lightning, no checks, no log. Rounds alternate, each with a new network, and time all steps but
the first few, which find their kernels and memory. On the CPU, the process's CPU time is compared as well: it doesn't
depend on what else the machine does.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import nn

from dyconvert import Recipe, load_recipe
from dyconvert.finetuning import run
from dyconvert.finetuning.data.datasets import Part, load_part
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


def bare(recipe: Recipe, part: Part, original: nn.Module, clock: Clock) -> None:
    """The loop that one writes by hand."""
    student = transform(original, recipe).train()
    optimizer = make_optimizer(student, recipe.train, recipe.dynamic)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_factor(recipe.train, len(part), 100))
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (recipe.data.mean, recipe.data.std))
    distill = recipe.distill
    for images, targets in train_loader(recipe, part, 0, 1):
        images = (images.float().div_(255) - mean) / std
        logits = student(images)
        loss = F.cross_entropy(logits, targets)
        if distill is not None:
            with torch.no_grad():
                taught = original(images)
            loss = (1 - distill.weight) * loss + distill.weight * distillation(logits, taught, distill.temperature)
        optimizer.zero_grad()
        loss.backward()
        if recipe.train.clip is not None:
            nn.utils.clip_grad_norm_(student.parameters(), recipe.train.clip)
        optimizer.step()
        schedule.step()
        clock.tick()


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


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("overrides", nargs="*", help="of the recipe, such as convert=null or distill=null")
    arguments = parser.parse_args()
    walls: dict[str, list[float]] = {"bare loop": [], "engine": []}
    cpus: dict[str, list[float]] = {"bare loop": [], "engine": []}
    for index in range(arguments.rounds):
        with folder() as place:
            recipe = load_recipe(
                "cifar10-resnet20",
                [
                    "model.weights=none",
                    "data.dataset=fake",
                    f"data.images={128 * arguments.steps}",
                    "data.limit_val=128",
                    "data.workers=0",
                    "train.epochs=1",
                    "train.devices=1",
                    f"output.directory={place / 'run'}",
                    *arguments.overrides,
                ],
            )
            original, _ = create_original(recipe)
            part = load_part(recipe, "train", 10, lambda line: None)
            ways: list[tuple[str, Callable[[Clock], None]]] = [
                ("bare loop", lambda clock, part=part, original=original, r=recipe: bare(r, part, original, clock)),
                ("engine", lambda clock, r=recipe: engine(r, clock)),
            ]
            for name, way in ways if index % 2 == 0 else reversed(ways):
                clock = Clock()
                way(clock)
                wall, cpu = clock.medians()
                walls[name].append(wall)
                cpus[name].append(cpu)
        print(f"round {index + 1} of {arguments.rounds}", file=sys.stderr)
    for title, times in (("seconds a step", walls), ("CPU seconds a step", cpus)):
        for name, found in times.items():
            print(f"{title:>20}  {name:<10} {statistics.median(found):.4f}  ({min(found):.4f} .. {max(found):.4f})")
        ratios = [a / b for a, b in zip(times["engine"], times["bare loop"], strict=True)]
        print(f"{'':>20}  ratio      {statistics.median(ratios):.3f}  ({min(ratios):.3f} .. {max(ratios):.3f})")


if __name__ == "__main__":
    main()
