"""How much is read, at most, of what others may have written; each limit with its reason.

A file beyond a limit is refused with an error of ours before its contents take memory or time.
"""

import json
import os
import stat
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# dyconvert.json of the largest models of timm (1,000 convs) has 0.5 MB, a report.json of 1,000 images 20 MB.
JSON_BYTES = 64 * 2**20
# Values of a description or a plan: those of the largest models have 40,000.
PLAN_VALUES = 500_000
# A model card: the longest on the Hub have 200 kB.
CARD_BYTES = 2**20
# Plans and reports have 8 levels; Python's own reading gives up at about 1,000, and what recurses over it sooner.
DEPTH = 50
# A Python file with a model's factory: the longest of timm and transformers have 0.3 MB.
CODE_BYTES = 16 * 2**20
# The longest shipped recipe has 4 kB; sweeps of many runs a hundred.
YAML_BYTES = 2**20
# The longest shipped recipe has 100 values; sweeps of many runs a few thousand. An alias counts as all that it stands
# for, so that nine lines can't become a billion values.
YAML_NODES = 20_000
# Values on a command line: a list of a few hundred layers' names.
OVERRIDE_BYTES = 64 * 2**10
# Runs of one sweep: a week of the shortest ones.
JOBS = 10_000
# A row takes 200 bytes; ten times as many rows as a sweep can have runs.
CSV_BYTES = 64 * 2**20
# A checkpoint's weights: ten times the largest convolutional networks of today with 32 experts.
WEIGHTS_BYTES = 2**37
# Tensors of one file: the largest models of timm have 3,000; a dynamic one up to twice as many.
TENSORS = 200_000
# Modules and tensors that a checkpoint's architecture may have for each tensor in its file. Narrowing and conversion
# change neither number by more than a few; a model with a thousand times as many isn't the saved one.
MODULES_PER_TENSOR = 20
# One tensor that an architecture makes, such as a table of positions, which grows with the fourth power of the image's
# side: those of 1,024 pixels have 0.1 GB, and the weights of a head with a million classes 8.
TABLE_BYTES = 2**30
# Parameters of a network that needs its values to be built, which few do; the largest of those has 0.2 GB.
MODEL_BYTES = 4 * 10**9
# Bytes that a zip archive may unpack to for each of its own. torch.save doesn't compress; others pack weights by half.
UNPACKED = 4
# Pixels of one image, PIL's own number: they take 270 MB as RGB; cameras make 60 million.
IMAGE_PIXELS = 89_478_485
# A side of the input that is asked for. One map of 64 channels at 4,096 x 4,096 has 4 GB.
INPUT_SIDE = 4_096
# Values of a tensor that is made up, such as an input: 1 GB in float32, 1,700 images of ImageNet's size.
INPUT_VALUES = 2**28
# Experts of a conv: the papers have up to 32. A ResNet-50 of 256 has 6 billion parameters.
EXPERTS = 256
# How far experts may differ at first, in root mean squares of a channel's weights: beyond, float32's rounding shows.
DIVERSITY = 1_000.0
# Standard deviation of paired experts' logits: beyond, every coefficient is 0 or 1.
SPREAD = 1_000.0
# Temperatures, by which logits are divided. Beyond, float32 has zero or infinity: all coefficients are equal or NaN.
TEMPERATURES = (1e-6, 1e6)
# Seeds of torch's and numpy's generators.
SEED = 2**63 - 1
# Of classes, ImageNet-21k has 21,841 and face recognition 360,000.
CLASSES = 2**20
# Steps, epochs, images: nothing that a recipe counts is ever as many, and beyond 64 bits torch has errors of its own.
COUNT = 10**9
# Learning rates, weights of losses, epochs in parts: beyond, one step takes float32 to infinity.
RATE = 1e6
# Means and deviations of an image's normalisation: bytes have means up to 255.
NORMAL = 1e6
# Processes of a run, and threads of a process: the largest machines have hundreds of cores, clusters some thousands.
PROCESSES = 4_096
# Images that are made up for a run: as many as eight ImageNets have.
FAKE_IMAGES = 10**7
# A figure in a table: parameters of a model have 12 digits.
FIGURE = 1e15
# Digits of a whole number on a command line, or of one of a list there: 64 bits have 19.
DIGITS = 18
# A word among the arguments of a library's model in a file: the name of an activation, a norm or the like.
WORD_CHARACTERS = 32
# A list among them: a size for each stage, or for each block.
ARGUMENT_ITEMS = 64
# Rounds of a measurement: hours of the shortest one.
REPEATS = 100_000
# Images at a time: an ImageNet epoch.
BATCH = 1_300_000


class LimitError(ValueError):
    """Something is larger, deeper or of another kind than what we read; the message says by how much."""


def read_bytes(file: Path, limit: int) -> bytes:
    """The contents of an ordinary file.

    Raises:
        LimitError: it is longer than `limit`, or a device, a pipe or the like, which may never end.
        OSError: it can't be read.
    """
    # A pipe that nobody writes to would be waited for.
    descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
        os.close(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise LimitError("it is no ordinary file")
        raise LimitError(f"it has {status.st_size:,} bytes, and at most {limit:,} are read")
    with open(descriptor, "rb") as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:  # such as those of /proc, whose size is 0
        raise LimitError(f"it has more than {limit:,} bytes")
    return content


def read_text(file: Path, limit: int) -> str:
    """The text of an ordinary file in UTF-8.

    Raises:
        ValueError: it isn't UTF-8, or a LimitError as in `read_bytes`.
        OSError: it can't be read.
    """
    return read_bytes(file, limit).decode("utf-8-sig")


def check_ordinary(file: Path) -> None:
    """Refuse devices, pipes and directories, which a library would wait for, or read without end.

    Raises:
        LimitError: it is one.
        OSError: it can't be looked at.
    """
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise LimitError("it is no ordinary file")


def check_archive(file: Path) -> None:
    """Refuse a zip archive, which torch.save writes, that unpacks to far more than it is, or isn't an ordinary file.

    Raises:
        LimitError: it does.
        OSError: it can't be read.
    """
    check_ordinary(file)
    size = os.stat(file).st_size
    try:
        if not zipfile.is_zipfile(file):
            return
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError) as error:
        raise LimitError(f"it is a damaged zip archive: {error}") from None
    if unpacked > UNPACKED * size + JSON_BYTES:
        raise LimitError(f"it has {size:,} bytes, and unpacks to {unpacked:,}")


def parse_json(text: str, most: int | None = None) -> Any:
    """Read JSON.

    Raises:
        ValueError: it isn't JSON, or a LimitError: it is nested deeper than `DEPTH`, or has more than `most` values.
    """
    try:
        content = json.loads(text)
    except RecursionError:
        raise LimitError(f"it is nested deeper than {DEPTH} levels") from None
    check_depth(content, most=most)
    return content


def _within(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def check_depth(root: Any, within: Callable[[Any], Iterable[Any]] = _within, most: int | None = None) -> None:
    """Refuse a tree that is nested deeper than `DEPTH`, or of more than `most` values.

    Args:
        within: what stands directly in a value; of dicts and lists, their values.

    Raises:
        LimitError: it is; a value that stands in two places counts twice.
    """
    level, count = [root], 0
    for _ in range(DEPTH):
        below: list[Any] = []
        for value in level:
            below.extend(within(value))
            if most is not None and count + len(below) > most:
                raise LimitError(f"it has more than {most:,} values; what an alias names counts each time")
        count += len(below)
        if not below:
            return
        level = below
    raise LimitError(f"it is nested deeper than {DEPTH} levels")
