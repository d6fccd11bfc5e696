"""Hostile images."""

import os
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from hostile_recipes import RECIPE, yaml_text
from hostile_values import ODD_FILES, Case, damaged, put


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
            put(folder / "r.yaml", yaml_text(RECIPE))
            make(folder)

        yield Case("images", f"{what}, {argv[0]}", prepare, argv=argv)
