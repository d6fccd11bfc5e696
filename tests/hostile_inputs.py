"""Generates hostile and unlucky inputs: for each place where a file, a name or a number comes in, mutated and extreme.

A case is a folder to prepare, and something to do there. The same seed gives the same cases.
"""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from hostile_images import images
from hostile_models import checkpoints, convert_arguments, weights_files
from hostile_recipes import RECIPE, recipes, runs, sweeps, yaml_text
from hostile_values import ODD_FILES, Case, dumps, mutated, put, replaced_by, value

_REPORT = ["report", "saved", "--sizes", "none", "--seconds", "0"]
# Commands, and options that are given each value in turn.
OPTIONS: list[tuple[list[str], str]] = [
    (
        convert_arguments(),
        "--g --reduction --temperature --scope --include --exclude --width --flops --seed --input-size --output --mean "
        "--round-to --method --weights --model-arg --keep --init --std --data --calibration-images --device",
    ),
    (["inspect", "saved"], "--input-size --limit --data --model --mean --std --device"),
    (["predict", "saved", "data"], "--top --input-size --mean --std --batch-size --model --device"),
    (
        ["collapse", "saved", "-o", "c.safetensors"],
        "--input-size --limit --data --model --output --coefficients --batch-size",
    ),
    (["export", "saved", "--to", "torch"], "--batch --input-size --output --to --model"),
    (
        ["bench", "layers", "--layer", "4,4,3,8", "--repeats", "1", "--batch", "1"],
        "--batch --g --layer --threads --repeats --method",
    ),
    (_REPORT, "--sizes --input-size --limit --batch-size --against --sweep --seconds --data --model"),
    (["recipes", "cp", "quickstart", "q.yaml"], ""),
    (["recipes", "show", "quickstart"], ""),
    (["ls", "--filter"], ""),
]


def options(rng: random.Random, good: Path) -> Iterator[Case]:
    while True:
        command, names = rng.choice(OPTIONS)
        found = value(rng) if rng.random() < 0.9 else rng.choice(["1,2,3", "3x8x8", "1", "8", "0.5", "1e5"])
        text = found if isinstance(found, str) else str(found)
        if "\x00" in text or "\udcff" in text:
            continue
        if names and rng.random() < 0.9:
            name = rng.choice(names.split())
            argv = [*command, name, text]
        else:
            at = rng.randrange(1, len(command))
            argv = [*command[:at], text, *command[at + 1 :]]
            name = f"argument {at}"
        yield Case(f"option of {command[0]}", f"{name} {text!r:.60}", lambda folder: None, argv=argv)


def outputs(rng: random.Random, good: Path) -> Iterator[Case]:
    """Places to write to that hold something else."""
    verbs = [
        (convert_arguments("--force", "--output", "out"), "out"),
        (convert_arguments("--force", "--output", "out"), "out/dyconvert.json"),
        (convert_arguments("--force", "--output", "out"), "out/model.safetensors"),
        (convert_arguments("--output", "out"), "out"),
        (["collapse", "saved", "--output", "c.pth", "--force"], "c.pth"),
        (["export", "saved", "--to", "torch", "--output", "e.pt2", "--force"], "e.pt2"),
        (["recipes", "cp", "quickstart", "q.yaml", "--force"], "q.yaml"),
        ([*_REPORT, "--output", "rep", "--force"], "rep/report.json"),
        ([*_REPORT, "--output", "rep", "--force"], "rep"),
        (["finetune", "./r.yaml"], "run/metrics.csv"),
        (["finetune", "./r.yaml"], "run"),
    ]
    while True:
        argv, place = rng.choice(verbs)
        odd = rng.choice(list(ODD_FILES))

        def prepare(folder: Path, place: str = place, odd: str = odd) -> None:
            put(folder / "r.yaml", yaml_text(RECIPE))
            put(folder / "outside" / "precious.txt", "mine")
            replaced_by(place, odd)(folder)

        yield Case(f"output of {argv[0]}", f"{place}: {odd}", prepare, argv=argv)


def python_arguments(rng: random.Random, good: Path) -> Iterator[Case]:
    """The same values from Python: one of our exception types, whatever comes in."""
    import dyconvert
    from dyconvert import models

    static, _ = models.create("builtin:digits-resnet8", "none", {"width": 2})
    dynamic = dyconvert.convert(static, g=2, example=torch.zeros(1, 1, 8, 8))
    example = torch.zeros(1, 1, 8, 8)
    plan = json.loads(dyconvert.plan(static, g=2, example=example).to_json())
    while True:
        found = value(rng)
        text = found if isinstance(found, str) else None
        number = found if isinstance(found, int | float) else 2
        calls: dict[str, Callable[[], Any]] = {
            "hub": lambda v=text: dyconvert.load(f"hf://{v}" if v else "hf://user/name"),
            "push": lambda v=text: dyconvert.push("saved", v or ""),
            "load": lambda v=text: dyconvert.load(v or "saved"),
            "save": lambda v=text: dyconvert.save(dynamic, v or "saved/x", force=True),
            "load_recipe": lambda v=text, n=found: dyconvert.load_recipe(v or "quickstart", [f"train.lr={n}"]),
            "create": lambda v=text: models.create(v or "digits-resnet8", "none"),
            "weights": lambda v=text: models.create("digits-resnet8", v or "none"),
            "g": lambda v=number: dyconvert.plan(static, g=v, example=example),
            "temperature": lambda v=number: dyconvert.plan(static, "dyconv", temperature=v, example=example),
            "seed": lambda v=number: dyconvert.convert(static, g=2, seed=v, example=example),
            "diversity": lambda v=number: dyconvert.convert(static, g=2, diversity=v, example=example),
            "width": lambda v=number: dyconvert.narrow(static, width=v, static=True, example=example),
        }
        name = rng.choice([*calls, "plan", "plan", "plan"])
        if name == "plan":
            changed, what = mutated(plan, rng)
            text = dumps(changed)
            yield Case("Plan.from_json", what, lambda folder: None, call=lambda t=text: dyconvert.Plan.from_json(t))
        else:
            yield Case(f"Python's {name}", f"{found!r:.60}", lambda folder: None, call=calls[name])


FAMILIES = (
    checkpoints, weights_files, recipes, sweeps, runs, images, options, options, outputs, python_arguments,
)  # fmt: skip


def cases(count: int, good: Path, seed: int = 0) -> Iterator[Case]:
    """So many cases, of each kind by turns."""
    makers = [family(random.Random(f"{seed} {number}"), good) for number, family in enumerate(FAMILIES)]
    for number in range(count):
        yield next(makers[number % len(makers)])
