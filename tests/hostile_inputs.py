"""Generates hostile and unlucky inputs: for each place where a file, a name or a number comes in, mutated and extreme.

A case is a folder to prepare, and something to do there. The same seed gives the same cases.
"""

import hashlib
import io
import json
import os
import pickle
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

MARK = "RAN"


class Payload:
    """Unpickled, it leaves a mark."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (MARK,)


@dataclass
class Case:
    """Something to do in a folder that `prepare` has made.

    Attributes:
        kind: where the input comes in.
        what: the mutation, in words.
        argv: of the command line; or `call`: a Python call.
    """

    kind: str
    what: str
    prepare: Callable[[Path], None]
    argv: list[str] | None = None
    call: Callable[[], Any] | None = None

    def __str__(self) -> str:
        return f"{self.kind}: {self.what}"


# ---- Values ----

TEXTS = [
    "", " ", "x", "a" * 5_000, "../../../etc/passwd", "/dev/zero", "/dev/stdin", "/proc/self/environ", "\x00", "a\x00b",
    "💥", "漢字", "$$", "$\\frac{1}{0}$", "%s%n{0}", "[bold]x[/bold]", "[/]", "\x1b[31mred", "os:system",
    "subprocess:call", "builtins:exec", "antigravity.py:fly", "http://127.0.0.1:9/x", "hf-hub:a/b", "local-dir:/",
    "__class__", "nan", "inf", "None", "true", "-", "--force", "~", "$HOME", "*", "\\", "a:b:c", ":", "con", ".", "..",
    "\udcff", "\u202e", "NaN", "1e999", "²", "１", "9" * 5_000, "1,²",
]  # fmt: skip
NUMBERS = [
    0, -1, 1, 2, 3, 255, 256, 1_000, 10**5, 2**31, 2**32, 2**63, 2**64, 10**12, 10**23, -(10**23), 0.5, -0.5, 1e-308,
    1e308, -1e308, float("inf"), float("-inf"), float("nan"), True, False,
]  # fmt: skip
STRUCTURES: list[Any] = [
    None,
    [],
    {},
    [None],
    [[]],
    {"": {}},
    [1, "a", None],
    {"a": [1]},
    [[[[[[1]]]]]],
    list(range(500)),
]


def value(rng: random.Random) -> Any:
    """Some extreme value."""
    return rng.choice(rng.choice([TEXTS, NUMBERS, NUMBERS, STRUCTURES]))


def mutated(content: Any, rng: random.Random) -> tuple[Any, str]:
    """JSON-like data with one place changed, and which."""
    content = json.loads(json.dumps(content))
    places = list(_places(content))
    holder, key, path = rng.choice(places)
    how = rng.random()
    if how < 0.15 and isinstance(holder, dict):
        del holder[key]
        return content, f"without {path}"
    if how < 0.25 and isinstance(holder, dict):
        name = rng.choice([text for text in TEXTS if text.isprintable() and len(text) < 100])
        holder[name] = value(rng)
        return content, f"{path} beside {name!r}"
    if how < 0.32 and isinstance(holder, list):
        holder *= 50
        return content, f"{path} fifty times"
    if how < 0.40:
        deep: Any = 1
        for _ in range(rng.choice([60, 500])):
            deep = [deep] if rng.random() < 0.5 else {"a": deep}
        holder[key] = deep
        return content, f"{path} nested deep"
    holder[key] = value(rng)
    return content, f"{path} = {holder[key]!r:.60}"


def _places(content: Any, path: str = "") -> Iterator[tuple[Any, Any, str]]:
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, each in pairs:
        here = f"{path}.{key}" if path else str(key)
        yield content, key, here
        yield from _places(each, here)


def damaged(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Bytes, cut or changed somewhere."""
    how = rng.randrange(6)
    at = rng.randrange(max(len(content), 1))
    if how == 0:
        return content[:at], f"cut at {at}"
    if how == 1:
        return content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :], f"byte {at} changed"
    if how == 2:
        return content[:at] + rng.randbytes(64) + content[at:], f"64 bytes put in at {at}"
    if how == 3:
        return rng.randbytes(rng.choice([0, 1, 7, 8, 9, 1000])), "noise"
    if how == 4:
        return struct.pack("<Q", rng.choice([0, 2**20, 2**40, 2**63, 2**64 - 1])) + content[8:], "another length first"
    return content + content, "twice"


def dumps(content: Any) -> str:
    """JSON, with what Python's own reader takes beyond it."""
    return json.dumps(content, ensure_ascii=True)


def put(file: Path, content: str | bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)


ODD_FILES: dict[str, Callable[[Path], None]] = {
    "a pipe": lambda file: os.mkfifo(file),
    "a link to /dev/zero": lambda file: file.symlink_to("/dev/zero"),
    "a link to itself": lambda file: file.symlink_to(file.name),
    "a broken link": lambda file: file.symlink_to("nowhere"),
    "a directory": lambda file: file.mkdir(),
    "unreadable": lambda file: (put(file, "x"), file.chmod(0)),
    "empty": lambda file: put(file, ""),
    "zeros": lambda file: put(file, bytes(100_000)),
    "deep JSON": lambda file: put(file, "[" * 1_000_000),
    "deep objects": lambda file: put(file, '{"a":' * 200_000),
    "UTF-16": lambda file: put(file, "{}".encode("utf-16")),
    "a terabyte of holes": lambda file: _sparse(file, 2**40),
}


def _sparse(file: Path, size: int) -> None:
    with open(file, "wb") as stream:
        stream.truncate(size)


def replaced_by(file: str, what: str) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        path = folder / file
        if path.exists():
            path.unlink()
        path.parent.mkdir(parents=True, exist_ok=True)
        ODD_FILES[what](path)

    return prepare


# ---- Checkpoints ----


def forged(content: dict[str, Any], weights: bytes | None = None) -> Callable[[Path], None]:
    """The saved model's description as given, with the hashes that belong to it."""

    def prepare(folder: Path) -> None:
        if weights is not None:
            put(folder / "saved" / "model.safetensors", weights)
        for part in ("plan", "narrowing"):
            if part in content and (part == "plan" or content[part] is not None):
                text = json.dumps(content[part], sort_keys=True)
                content[f"{part}_sha256"] = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        data = (folder / "saved" / "model.safetensors").read_bytes()
        content["sha256"] = hashlib.sha256(data).hexdigest()
        put(folder / "saved" / "dyconvert.json", dumps(content))

    return prepare


def load_saved() -> Any:
    import dyconvert

    return dyconvert.load("saved")


def checkpoints(rng: random.Random, good: Path) -> Iterator[Case]:
    content = json.loads((good / "saved" / "dyconvert.json").read_text())
    weights = (good / "saved" / "model.safetensors").read_bytes()
    while True:
        how = rng.random()
        case: dict[str, Any] = {"call": load_saved} if rng.random() < 0.85 else {"argv": ["inspect", "saved"]}
        if how < 0.45:
            changed, what = mutated(content, rng)
            yield Case("dyconvert.json", what, forged(changed), **case)
        elif how < 0.6:
            source = dict(content["source"])
            name = rng.choice(
                ["num_classes", "width", "checkpoint_path", "weights_backbone", "pretrained", "cache_dir", "layers",
                 "block_args", "weights", "progress", "depth", "pretrained_cfg", "in_chans", "width_mult", "img_size"]
            )  # fmt: skip
            source["arguments"] = {name: rng.choice([value(rng), 4_096])}
            source["specifier"] = rng.choice(
                ["builtin:digits-resnet8", "timm:resnet10t", "torchvision:resnet18", "torchvision:fcn_resnet50",
                 "timm:coatnet_0_rw_224", "os:mkdir", "subprocess:call", "/tmp/x.py:f", "timm:hf-hub:x/y",
                 rng.choice(TEXTS)]
            )  # fmt: skip
            changed = content | {"source": source}
            yield Case(
                "source",
                f"{source['specifier']!r:.60} {name}={source['arguments'][name]!r:.60}",
                forged(changed),
                **case,
            )
        elif how < 0.8:
            changed_bytes, what = damaged(weights, rng)
            yield Case("weights of a checkpoint", what, forged(dict(content), changed_bytes), **case)
        elif how < 0.9:
            header, what = mutated(json.loads(weights[8 : 8 + struct.unpack("<Q", weights[:8])[0]]), rng)
            text = json.dumps(header).encode("utf-8", "surrogatepass")
            made = struct.pack("<Q", len(text)) + text + weights[8 + struct.unpack("<Q", weights[:8])[0] :]
            yield Case("header of a checkpoint", what, forged(dict(content), made), **case)
        else:
            file = rng.choice(["saved/dyconvert.json", "saved/model.safetensors"])
            odd = rng.choice(list(ODD_FILES))
            yield Case(file, odd, replaced_by(file, odd), **case)


# ---- Weights files ----


def _torch_file(content: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def zip_bomb(size: int = 2**32) -> bytes:
    """A zip archive as torch.save's, of which one entry unpacks to `size` zeros."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("archive/version", "3")
        with archive.open("archive/data/0", "w", force_zip64=True) as entry:
            for _ in range(size // 2**24):
                entry.write(bytes(2**24))
    return stream.getvalue()


def weights_files(rng: random.Random, good: Path) -> Iterator[Case]:
    from dyconvert import models

    state = models.create("builtin:digits-resnet8", "none", {"width": 2})[0].state_dict()
    whole = _torch_file(state)
    bomb = zip_bomb(2**30)

    def odd_state() -> tuple[Any, str]:
        name = rng.choice(list(state))
        made = dict(state)
        choices = {
            "int32": lambda t: t.to(torch.int32),
            "complex": lambda t: t.to(torch.complex64),
            "scalar": lambda t: t.sum(),
            "expanded": lambda t: torch.zeros(()).expand(10**6, 10**6),
            "sparse": lambda t: torch.zeros(3, 3).to_sparse(),
            "text": lambda t: "x",
            "none": lambda t: None,
            "payload": lambda t: Payload(),
            "empty": lambda t: t.reshape(-1)[:0],
            "bool": lambda t: t.bool(),
            "nested": lambda t: {"a": {"b": t}},
        }
        how = rng.choice(list(choices))
        made[name] = choices[how](made[name].float())
        return made, f"{name} as {how}"

    while True:
        suffix = rng.choice([".pth", ".pt", ".safetensors", ".bin", ".th"])
        how = rng.random()
        file = f"w{suffix}"
        if how < 0.35:
            content, what = damaged(whole, rng)
        elif how < 0.6:
            made, what = odd_state()
            try:
                content = _torch_file(made)
            except Exception:
                continue
        elif how < 0.65:
            content, what = bomb, "a zip bomb"
        elif how < 0.75:
            made = rng.choice(
                [Payload(), {"state_dict": Payload()}, [state], {"model": {}}, torch.nn.Linear(2, 2), {}, 3]
            )
            content, what = _torch_file(made), f"a {type(made).__name__}"
            if rng.random() < 0.3:
                content, what = pickle.dumps(Payload(), protocol=rng.choice([0, 2, 4])), "a pickle"
        elif how < 0.8:
            odd = rng.choice(list(ODD_FILES))
            yield Case("factory", odd, replaced_by("m.py", odd), argv=["convert", "m.py:f"])
            continue
        else:
            odd = rng.choice(list(ODD_FILES))
            yield Case(
                "weights file", f"{suffix} {odd}", replaced_by(file, odd), argv=_convert("--weights", f"./{file}")
            )
            continue
        yield Case(
            "weights file",
            f"{suffix} {what}",
            lambda folder, file=file, content=content: put(folder / file, content),
            argv=_convert("--weights", f"./{file}"),
        )


def _convert(*more: str, model: str = "digits-resnet8") -> list[str]:
    arguments = [] if model != "digits-resnet8" else ["--model-arg", "width=2"]
    weights = [] if "--weights" in more else ["--weights", "none"]
    return ["convert", model, *arguments, *weights, "--g", "2", *more]


# ---- Recipes, overrides, sweeps ----


def _yaml(content: Any) -> str:
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
    keys = [path for _, _, path in _places(RECIPE)]

    def dry(file: str = "./r.yaml", *more: str) -> list[str]:
        return ["finetune", file, *more, "--dry-run"]

    while True:
        how = rng.random()
        if how < 0.5:
            changed, what = mutated(RECIPE, rng)
            try:
                text = _yaml(changed)
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
                "override", override[:80], lambda f: put(f / "r.yaml", _yaml(RECIPE)), argv=dry("./r.yaml", override)
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
                text = _yaml(changed)
            except Exception:
                continue

            def prepare(folder: Path, text: str = text) -> None:
                put(folder / "r.yaml", _yaml(RECIPE))
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
    put(folder / "r.yaml", _yaml(RECIPE))
    put(folder / "s.yaml", _yaml(SWEEP))


# ---- A run's directory ----

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
            content = _torch_file(
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
                files = {"recipe.yaml": _yaml(changed).encode("utf-8", "surrogatepass")}
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
    put(folder / "r.yaml", _yaml(RECIPE))
    put(folder / "run" / "recipe.yaml", _yaml(RECIPE))


# ---- Images ----


def png(
    width: int, height: int, chunks: bytes = b"", data: bytes | None = None, depth: int = 8, colour: int = 0
) -> bytes:
    """A PNG of zeros, or one that only says that it is so large."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    if data is None:
        data = (
            zlib.compress(bytes((width * depth // 8 * (3 if colour == 2 else 1) + 1) * height))
            if width * height < 10**7
            else b""
        )
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunks + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    body = b"k\x00\x00" + zlib.compress(bytes(200 * 2**20))
    return struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))


def renamed(folder: Path, name: str) -> None:
    """Give a class another name, for training and for validation."""
    for part in ("train", "val"):
        (folder.parents[1] / part / folder.name).rename(folder.parents[1] / part / name)


def images(rng: random.Random, good: Path) -> Iterator[Case]:
    bomb = text_bomb()

    def folder_of(change: Callable[[Path], None]) -> Callable[[Path], None]:
        def prepare(folder: Path) -> None:
            for part in ("train", "val"):
                for name in ("a", "b"):
                    for number in range(8):
                        put(folder / "data" / part / name / f"{number}.png", png(8, 8))
            change(folder / "data" / "train" / "a")

        return prepare

    makers: list[tuple[str, Callable[[Path], None]]] = [
        ("a decompression bomb", lambda f: put(f / "x.png", png(60_000, 60_000))),
        ("a text bomb", lambda f: put(f / "x.png", png(8, 8, bomb))),
        ("16 bits", lambda f: put(f / "x.png", png(8, 8, depth=16))),
        ("a GIF", lambda f: put(f / "x.gif", b"GIF89a\x01\x00\x01\x00\x00\x00\x00;")),
        ("a loop", lambda f: (f / "loop").symlink_to("..")),
        ("two loops", lambda f: ((f / "loop").symlink_to(".."), (f / "again").symlink_to("../..")),),
        ("a link to /", lambda f: (f / "root").symlink_to("/")),
        ("a name that is no text", lambda f: put(Path(os.fsdecode(bytes(f) + b"/\xff.png")), png(8, 8))),
        ("a class that is no text", lambda f: renamed(f, os.fsdecode(b"\xff"))),
        ("one class", lambda f: [each.unlink() for each in (f.parent / "b").iterdir()] and (f.parent / "b").rmdir()),
        ("no image", lambda f: [each.unlink() for each in f.iterdir()]),
        ("a pixel", lambda f: put(f / "x.png", png(1, 1))),
        ("a line", lambda f: put(f / "x.png", png(5_000, 1))),
        ("dollars", lambda f: renamed(f, "$$")),
        ("markup", lambda f: renamed(f, "[bold]x[bold]")),
        ("CJK", lambda f: renamed(f, "漢字")),
    ]  # fmt: skip
    whole = png(8, 8)
    from_folder = ["finetune", "./r.yaml", "data.dataset=imagefolder", "data.num_classes=null", "model.num_classes=2"]
    while True:
        verbs = [
            ["convert", "digits-resnet8", "--model-arg", "width=2", "--weights", "none", "--width", "0.5", "--static",
             "--data", "data/train", "--round-to", "1"],
            ["inspect", "saved", "--data", "data/train"],
            ["predict", "saved", "data/train"],
            ["predict", "saved", "data/train/a/x.png", "--json"],
            ["collapse", "saved", "--data", "data/train", "-o", "c.pth"],
            ["report", "saved", "--data", "data/train", "--sizes", "none", "--seconds", "0"],
            [*from_folder, "--dry-run"],
            [*from_folder, "data.skip_corrupt=true"],
        ]  # fmt: skip
        argv = rng.choice(verbs)
        how = rng.random()
        if how < 0.55:
            what, change = rng.choice(makers)
        elif how < 0.8:
            content, what = damaged(whole, rng)

            def change(folder: Path, content: bytes = content) -> None:
                put(folder / f"x{rng.choice(['.png', '.jpg', '.tiff', '.bmp', '.webp'])}", content)
        else:
            what = rng.choice(list(ODD_FILES))

            def change(folder: Path, what: str = what) -> None:
                ODD_FILES[what](folder / "x.png")

        make = folder_of(change)

        def prepare(folder: Path, make: Callable[[Path], None] = make) -> None:
            put(folder / "r.yaml", _yaml(RECIPE))
            make(folder)

        yield Case("images", f"{what}, {argv[0]}", prepare, argv=argv)


# ---- The command line, and Python's arguments ----

_REPORT = ["report", "saved", "--sizes", "none", "--seconds", "0"]
# Commands, and options that are given each value in turn.
OPTIONS: list[tuple[list[str], str]] = [
    (
        _convert(),
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
        (_convert("--force", "--output", "out"), "out"),
        (_convert("--force", "--output", "out"), "out/dyconvert.json"),
        (_convert("--force", "--output", "out"), "out/model.safetensors"),
        (_convert("--output", "out"), "out"),
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
            put(folder / "r.yaml", _yaml(RECIPE))
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
