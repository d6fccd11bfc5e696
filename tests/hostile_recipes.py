"""Hostile recipes, sweeps and run directories."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hostile_models import torch_file
from hostile_values import (
    NUMBERS,
    ODD_FILES,
    TEXTS,
    Case,
    Payload,
    damaged,
    dumps,
    mutated,
    places_in,
    put,
    replaced_by,
    value,
)


def yaml_text(content: Any) -> str:
    import yaml

    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


BOMBS = {
    "aliases": "".join(
        f"{name}: &{name} [{','.join(['*' + before] * 9 if before else ['x'] * 9)}]\n"
        for before, name in zip(["", *"abcdefgh"], "abcdefghi", strict=True)
    ),
    "merged aliases": "a0: &a0 {x: 1, y: 2}\n"
    + "".join(f"a{i}: &a{i}\n  <<: [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)),
    "itself": "model: &a [*a, *a]\n",
    "deep lists": "model: " + "[" * 50_000,
    "deep mappings": "".join(" " * i + "a:\n" for i in range(3_000)),
    "dashes": "- " * 20_000,
    "a tag": "model: !!python/object/apply:os.mkdir [RAN]\n",
    "a new tag": "model: !!python/object/new:os.mkdir [RAN]\n",
    "a date": "model: 2020-01-01\n",
    "tabs": "model:\n\tspecifier: x\n",
    "two documents": "a: 1\n---\nb: 2\n",
    "a binary": "model: !!binary aGVsbG8=\n",
    "a set": "model: !!set {a, b}\n",
    "nothing": "",
    "megabytes": "name: " + "x" * 2_000_000,
}

RECIPE = {
    "name": "tiny",
    "description": "",
    "model": {"specifier": "builtin:digits-resnet8", "weights": "none", "arguments": {"width": 2}, "num_classes": 10,
              "new_head": False, "input_size": [1, 8, 8]},
    "pretrain": None,
    "convert": {"method": "dynet", "g": 2, "scope": "block", "reduction": 0, "include": [], "exclude": []},
    "narrow": None,
    "data": {"dataset": "fake", "size": 8, "channels": 1, "mean": [0.5], "std": [0.5], "images": 64, "augment": "none",
             "workers": 0, "arguments": {}, "root": "data", "train": "train", "val": "val", "task": "classification",
             "num_classes": 10, "limit_train": 50, "limit_val": 10, "subset_seed": 0},
    "train": {"epochs": 1, "max_steps": 1, "batch": 8, "accumulate": 1, "optimizer": "sgd", "lr": 0.1, "momentum": 0.9,
              "schedule": "cosine", "warmup_epochs": 0.0, "weight_decay": 0.0, "label_smoothing": 0.0, "mixup": 0.0,
              "clip": None, "ema": None, "seed": 0, "accelerator": "cpu", "devices": 1, "nodes": 1, "strategy": "auto"},
    "dynamic": {"predictor_lr": 1.0, "expert_lr": None, "diversity": 0.1, "temperature": None, "pair_spread": None},
    "output": {"directory": "run", "checkpoint_steps": None, "checkpoint_minutes": None, "loggers": ["csv"]},
}  # fmt: skip
SWEEP = {
    "name": "s",
    "recipe": "./r.yaml",
    "overrides": ["train.max_steps=1"],
    "runs": [{"name": "a", "overrides": ["convert.g=2"]}, {"name": "b", "overrides": ["convert=null"]}],
    "seeds": [0],
}


def recipes(rng: random.Random, good: Path) -> Iterator[Case]:
    keys = [path for _, _, path in places_in(RECIPE)]

    def dry(file: str = "./r.yaml", *more: str) -> list[str]:
        return ["finetune", file, *more, "--dry-run"]

    while True:
        how = rng.random()
        if how < 0.5:
            changed, what = mutated(RECIPE, rng)
            try:
                text = yaml_text(changed)
            except Exception:
                continue
            yield Case("recipe", what, lambda f, text=text: put(f / "r.yaml", text), argv=dry())
        elif how < 0.75:
            found = value(rng)
            override = f"{rng.choice(keys)}={found if isinstance(found, str) else dumps(found)}"
            if "\x00" in override or "\udcff" in override:  # no argument of a process can have one
                continue
            if rng.random() < 0.1:
                override = rng.choice(
                    ["=", "a", "a.b.c=1", "a." * 9_000 + "b=1", "model=null", "train=3", "..=1", "model.specifier.x=1"]
                )
            yield Case(
                "override",
                override[:80],
                lambda f: put(f / "r.yaml", yaml_text(RECIPE)),
                argv=dry("./r.yaml", override),
            )
        elif how < 0.85:
            name = rng.choice(list(BOMBS))
            more = [["validate", "./r.yaml"], ["sweep", "./r.yaml", "--dry-run"], ["cp", "./r.yaml", "copy.yaml"]]
            verb = rng.choice([dry(), *(["recipes", *each] for each in more)])
            yield Case("YAML", f"{name}, {verb[1]}", lambda f, n=name: put(f / "r.yaml", BOMBS[n]), argv=verb)
        elif how < 0.93:
            odd = rng.choice(list(ODD_FILES))
            yield Case("recipe file", odd, replaced_by("r.yaml", odd), argv=dry())
        else:
            name = rng.choice([text for text in TEXTS if "\x00" not in text and "\udcff" not in text])
            yield Case("recipe's name", f"{name!r:.60}", lambda f: put(f / "quickstart", "x: 1"), argv=dry(name))


ROW = {
    "run": "a", "seed": "0", "recipe": "r", "method": "dynet", "g": "2", "width": "", "flops": "", "static": "False",
    "epochs": "1", "original": "50.0", "converted": "50.0", "finetuned": "60.0", "ema": "", "parameters": "1000",
    "macs": "2000", "seconds": "3.0", "fingerprint": "00000000",
}  # fmt: skip


def table(rng: random.Random) -> tuple[bytes, str]:
    """A sweep.csv that went through a spreadsheet, or worse."""
    rows = [dict(ROW), dict(ROW) | {"seed": "1"}]
    key = rng.choice(list(ROW))
    found = rng.choice(TEXTS + [str(n) for n in NUMBERS] + ["1,5", "0,00 %", "1.2E+03", "#DIV/0!"])
    how = rng.randrange(6)
    rows[0][key] = found
    separator = rng.choice([",", ",", ";", "\t"]) if how == 1 else ","
    names = [name for name in ROW if how != 2 or name != key]
    lines = [separator.join(names)]
    lines += [separator.join('"' + row[name].replace('"', '""') + '"' for name in names) for row in rows]
    text = "\r\n".join(lines) + "\r\n"
    content = text.encode("utf-8", "surrogatepass")
    if how == 3:
        content = b"\xef\xbb\xbf" + content
    if how == 4:
        content, _ = damaged(content, rng)
    if how == 5:
        content = text.encode("utf-16", "surrogatepass")
    return content, f"{key}={found!r:.40}, way {how}"


def sweeps(rng: random.Random, good: Path) -> Iterator[Case]:
    while True:
        how = rng.random()
        if how < 0.5:
            changed, what = mutated(SWEEP, rng)
            try:
                text = yaml_text(changed)
            except Exception:
                continue

            def prepare(folder: Path, text: str = text) -> None:
                put(folder / "r.yaml", yaml_text(RECIPE))
                put(folder / "s.yaml", text)

            yield Case("sweep", what, prepare, argv=["recipes", "sweep", "./s.yaml", "--dry-run"])
        elif how < 0.6:
            seeds = rng.choice(["", "a", "0,0", "1e5", "-1", str(10**23), ",".join(map(str, range(20_000))), "0x1"])
            yield Case(
                "--seeds",
                seeds[:40],
                _sweep_files,
                argv=["recipes", "sweep", "./s.yaml", "--seeds", seeds, "--dry-run"],
            )
        else:
            content, what = table(rng)

            def with_table(folder: Path, content: bytes = content) -> None:
                _sweep_files(folder)
                put(folder / "runs" / "s" / "sweep.csv", content)

            yield Case("sweep.csv", what, with_table, argv=["recipes", "sweep", "./s.yaml", "--dry-run"])


def _sweep_files(folder: Path) -> None:
    put(folder / "r.yaml", yaml_text(RECIPE))
    put(folder / "s.yaml", yaml_text(SWEEP))


SUMMARY = {
    "name": "tiny", "directory": "run", "metric": "top-1", "original": 50.0, "converted": 50.0, "finetuned": 60.0,
    "ema": None, "best": 60.0, "best_epoch": 1, "parameters": [10, 20], "macs": [10, 20], "images": [10, 5],
    "corrupt": 0, "epochs": 1.0, "seconds": 1.0,
}  # fmt: skip


# Of a checkpoint, what is looked at before the rest is.
PROGRESS = {
    "loops": {
        "fit_loop": {
            "epoch_progress": {"current": {"processed": 10**9}},
            "epoch_loop.batch_progress": {"is_last_batch": False, "current": {"processed": -1}},
        }
    },
    "global_step": 10**9,
}


def runs(rng: random.Random, good: Path) -> Iterator[Case]:
    while True:
        how = rng.random()
        if how < 0.4:
            changed, what = mutated(SUMMARY, rng)
            files = {"summary.json": dumps(changed).encode()}
        elif how < 0.6:
            content = torch_file(
                rng.choice([{"x": Payload()}, {"loops": {}}, {}, [], {"loops": {"fit_loop": 3}}, PROGRESS])
            )
            if rng.random() < 0.5:
                content, _ = damaged(content, rng)
            what = "resume.ckpt"
            files = {"resume.ckpt": content, "before.json": b'{"original": 50.0, "converted": 50.0}'}
        elif how < 0.7:
            changed, what = mutated({"original": 50.0, "converted": 50.0}, rng)
            files = {"before.json": dumps(changed).encode(), "resume.ckpt": b"x"}
        elif how < 0.85:
            changed, what = mutated(RECIPE, rng)
            try:
                files = {"recipe.yaml": yaml_text(changed).encode("utf-8", "surrogatepass")}
            except Exception:
                continue
        else:
            name = rng.choice(["summary.json", "recipe.yaml", "resume.ckpt", "metrics.csv", "last", "run.lock"])
            odd = rng.choice(list(ODD_FILES))

            def odd_run(folder: Path, name: str = name, odd: str = odd) -> None:
                _run_files(folder)
                replaced_by(f"run/{name}", odd)(folder)

            yield Case("run's directory", f"{name} {odd}", odd_run, argv=["finetune", "./r.yaml", "--resume"])
            continue

        def prepare(folder: Path, files: dict[str, bytes] = files) -> None:
            _run_files(folder)
            for name, content in files.items():
                put(folder / "run" / name, content)

        yield Case("run's directory", what, prepare, argv=["finetune", "./r.yaml", "--resume"])


def _run_files(folder: Path) -> None:
    put(folder / "r.yaml", yaml_text(RECIPE))
    put(folder / "run" / "recipe.yaml", yaml_text(RECIPE))
