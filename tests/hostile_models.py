"""Hostile saved models and weights files."""

import hashlib
import io
import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from hostile_values import ODD_FILES, TEXTS, Case, Payload, damaged, dumps, mutated, put, replaced_by, value


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


def torch_file(content: Any) -> bytes:
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
    whole = torch_file(state)
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
                content = torch_file(made)
            except Exception:
                continue
        elif how < 0.65:
            content, what = bomb, "a zip bomb"
        elif how < 0.75:
            made = rng.choice(
                [Payload(), {"state_dict": Payload()}, [state], {"model": {}}, torch.nn.Linear(2, 2), {}, 3]
            )
            content, what = torch_file(made), f"a {type(made).__name__}"
            if rng.random() < 0.3:
                content, what = pickle.dumps(Payload(), protocol=rng.choice([0, 2, 4])), "a pickle"
        elif how < 0.8:
            odd = rng.choice(list(ODD_FILES))
            yield Case("factory", odd, replaced_by("m.py", odd), argv=["convert", "m.py:f"])
            continue
        else:
            odd = rng.choice(list(ODD_FILES))
            yield Case(
                "weights file",
                f"{suffix} {odd}",
                replaced_by(file, odd),
                argv=convert_arguments("--weights", f"./{file}"),
            )
            continue
        yield Case(
            "weights file",
            f"{suffix} {what}",
            lambda folder, file=file, content=content: put(folder / file, content),
            argv=convert_arguments("--weights", f"./{file}"),
        )


def convert_arguments(*more: str, model: str = "digits-resnet8") -> list[str]:
    arguments = [] if model != "digits-resnet8" else ["--model-arg", "width=2"]
    weights = [] if "--weights" in more else ["--weights", "none"]
    return ["convert", model, *arguments, *weights, "--g", "2", *more]
