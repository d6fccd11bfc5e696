"""Hostile values, damaged files, and the cases that they are used in."""

import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    places = list(places_in(content))
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


def places_in(content: Any, path: str = "") -> Iterator[tuple[Any, Any, str]]:
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, each in pairs:
        here = f"{path}.{key}" if path else str(key)
        yield content, key, here
        yield from places_in(each, here)


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
