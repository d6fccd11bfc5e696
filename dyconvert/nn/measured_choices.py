"""Measured choice: the fastest strategy for a shape, found by timing on the machine that runs it, and remembered.

On a GPU no rule says which strategy is the fastest: it depends on the card, the libraries and the shape. So the first
call of a shape times those that can serve it, as cuDNN's benchmark mode does, and what was found is kept for the
process and, in a file of the user's cache directory, for the next.
"""

import json
import math
import os
import re
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dyconvert.errors import brief
from dyconvert.version import __version__

MODES = ("on", "off", "read-only")
# The version of the file's layout. Each version has a folder of its own, so files of another are left alone.
VERSION = 1
# Seconds that calls of one strategy are repeated for at a time, and the most calls.
_SECONDS = 0.002
_CALLS = 20


class Key(NamedTuple):
    """The key of a measurement: the fastest strategy depends on it, on the machine and on the libraries."""

    shape: tuple[int, ...]
    weight: tuple[int, ...]
    coefficients: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    dtype: torch.dtype
    bank_dtype: torch.dtype
    device: torch.device
    channels_last: bool
    bank_channels_last: bool
    bias: bool
    training: bool  # whether a backward may follow
    threads: int  # of the CPU; 0 on other devices
    precision: str  # float32's on a GPU: cuDNN's and cuBLAS's, and whether cuDNN measures its own algorithms
    factors: bool = False  # whether the elements of mixed kernels have factors

    def __str__(self) -> str:
        """One line for people and for the file; it names no device, for the file is one device's."""

        def by(sizes: tuple[int, ...] | str) -> str:
            return sizes if isinstance(sizes, str) else "x".join(map(str, sizes))

        def kind(dtype: torch.dtype, last: bool) -> str:
            return str(dtype).removeprefix("torch.") + (" channels_last" if last else "")

        return (
            f"x {by(self.shape)} {kind(self.dtype, self.channels_last)}, "
            f"bank {by(self.weight)} {kind(self.bank_dtype, self.bank_channels_last)}, "
            f"coefficients {by(self.coefficients)}, stride {by(self.stride)}, padding {by(self.padding)}, "
            f"dilation {by(self.dilation)}, groups {self.groups}, "
            + ("factors, " if self.factors else "")
            + ("bias, " if self.bias else "")
            + ("training" if self.training else "inference")
            + (f", threads {self.threads}" if self.threads else "")
            + (f", {self.precision}" if self.precision else "")
        )


class Measured(NamedTuple):
    """The strategy that was the fastest, and each one's seconds a call; empty where the file wasn't asked for them."""

    strategy: str
    seconds: Mapping[str, float]


class Choices:
    """Measurements of this machine, in the process and in a folder.

    Args:
        folder: holds a file for each device and set of libraries; None: nothing is read or written.
        clock: seconds.
        cpu: measure on a CPU as well, for which there are rules.
    """

    def __init__(
        self, folder: Path | None = None, *, clock: Callable[[], float] = time.perf_counter, cpu: bool = False
    ) -> None:
        self.cpu = cpu
        self._folder = folder
        self._clock = clock
        self._measured: dict[Key, Measured] = {}
        self._files: dict[torch.device, dict[str, Measured]] = {}
        self._failed: dict[str, str] = {}
        self._warned: set[str] = set()
        self._lock = threading.RLock()  # measurements of two threads would disturb each other

    def __len__(self) -> int:
        """How many shapes something was chosen for in this process."""
        return len(self._measured)

    def known(self, key: Key) -> str | None:
        """The choices of this process, measured here or read from the file."""
        choice = self._measured.get(key)
        return None if choice is None or choice.strategy in self._failed else choice.strategy

    def read(self, key: Key) -> str | None:
        """The choice of this process, or that of an earlier one, from the file."""
        choice = self._file(key.device).get(str(key))
        if choice is not None and choice.strategy not in self._failed:
            self._measured.setdefault(key, choice)
        return self.known(key)

    def choose(self, key: Key, trials: Mapping[str, Callable[[], object]], rule: str) -> str:
        """The strategy for `key`: known or read, else the fastest of the trials, which is then kept.

        Args:
            trials: for each strategy that can serve the key, the function to time.
            rule: the strategy where none of them runs.
        """
        with self._lock:
            read = self.known(key) or self.read(key)
            return read if read in trials else self.measure(key, trials, rule)

    def measure(
        self, key: Key, trials: Mapping[str, Callable[[], object]], rule: str, *, repeats: int = 2, file: bool = True
    ) -> str:
        """The fastest of the trials, kept for this process and, where `file`, for the next.

        Args:
            repeats: how often each is measured; the lowest counts.
        """
        with self._lock:
            seconds = {}
            for name, trial in trials.items():
                if name not in self._failed and (took := self._try(name, trial, key, repeats)) is not None:
                    seconds[name] = took
            choice = Measured(min(seconds, key=seconds.__getitem__) if seconds else rule, seconds)
            self._measured[key] = choice
            # If a strategy failed here, another process may have more memory, or a compiler: nothing is written.
            if file and len(seconds) == len(trials):
                self._write(key, choice)
            return choice.strategy

    def fail(self, names: Sequence[str], error: BaseException, *, warn: bool = True) -> None:
        """Leave strategies out in this process from now on, with one warning that says why."""
        reason = brief(error)
        if not all(name in self._failed for name in names):
            self._failed.update(dict.fromkeys(names, reason))
            if warn:
                which = " and ".join(map(repr, names)) if len(names) < 3 else f"{names[0]!r} to {names[-1]!r}"
                self._warn(names[0], f"Strategy {which} fails here and is left out: {reason}. Others take its place.")

    def failed(self, name: str) -> bool:
        """Whether the strategy failed in this process."""
        return name in self._failed

    def items(self) -> dict[str, Measured]:
        """All that was chosen in this process, for people to read."""
        return {str(key): choice for key, choice in self._measured.items()}

    def _try(self, name: str, trial: Callable[[], object], key: Key, repeats: int) -> float | None:
        """Seconds a call; None if it can't run."""
        try:
            took = self._time(trial, key.device, repeats)
        except Exception as error:
            if out_of_memory(error):
                self._warn(
                    "memory",
                    f"There wasn't memory to measure the strategy {name!r} ({brief(error)}). It is left out for this "
                    "shape, and in this process for others where the same happens.",
                )
                if key.device.type != "cpu":
                    torch.accelerator.memory.empty_cache()
            else:
                self.fail([name], error)
            return None
        # A strategy that fails is reported and replaced by another, which must not be timed in its name.
        return None if name in self._failed else took

    def _time(self, trial: Callable[[], object], device: torch.device, repeats: int) -> float:
        trial()  # compiles, and finds its memory
        once = self._block(trial, 1, device)
        calls = min(max(round(_SECONDS / once), 1), _CALLS) if once > 0 else _CALLS
        return min(self._block(trial, calls, device) for _ in range(repeats))

    def _block(self, trial: Callable[[], object], calls: int, device: torch.device) -> float:
        _synchronize(device)
        start = self._clock()
        for _ in range(calls):
            trial()
        _synchronize(device)
        return (self._clock() - start) / calls

    def _warn(self, about: str, text: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    def _file(self, device: torch.device) -> dict[str, Measured]:
        """The content of the device's file, which is read once."""
        if device not in self._files:
            self._files[device] = {} if self._folder is None else self._load(self._path(device))
        return self._files[device]

    def _path(self, device: torch.device) -> Path:
        name = re.sub(r"[^\w.+-]+", "_", "_".join(environment(device)))
        return self._folder / f"v{VERSION}" / f"{name}.json"

    def _load(self, path: Path) -> dict[str, Measured]:
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
            if read["version"] != VERSION:
                raise ValueError(f"version {read['version']}")
            return {str(key): _as_measured(value) for key, value in read["choices"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            self._warn(
                "file",
                f"{path} can't be read as measured choices of strategies ({brief(error)}). Strategies are measured "
                "again, and the file is replaced.",
            )
            return {}

    def _write(self, key: Key, choice: Measured) -> None:
        """Add to the device's file, in one step: readers see the file of before, or of after."""
        if self._folder is None:
            return
        path = self._path(key.device)
        # Other processes may have written meanwhile: their choices are kept.
        choices = {**self._load(path), str(key): choice}
        self._files[key.device] = choices
        text = json.dumps(
            {
                "version": VERSION,
                "environment": environment(key.device),
                "choices": {name: value._asdict() for name, value in sorted(choices.items())},
            },
            indent=1,
        )
        temporary = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem[:40], suffix=".tmp")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text + "\n")
            os.replace(temporary, path)
        except OSError as error:
            if temporary is not None:
                with suppress(OSError):
                    os.unlink(temporary)
            self._warn(
                "write",
                f"{path} can't be written ({brief(error)}), so strategies are measured again by the next process. "
                "DYCONVERT_CACHE names another folder; DYCONVERT_MEASURE=off chooses by rule.",
            )


def _as_measured(value: dict[str, Any]) -> Measured:
    strategy, seconds = value["strategy"], {str(name): float(took) for name, took in value["seconds"].items()}
    if not isinstance(strategy, str) or not all(math.isfinite(took) for took in seconds.values()):
        raise ValueError("an entry that is no measurement")
    return Measured(strategy, seconds)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was short: torch has a type for it on a GPU, and none on a CPU or MPS."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "out of memory" in str(error).lower()


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def environment(device: torch.device) -> list[str]:
    """The device and the libraries, whose change makes measurements worthless."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        libraries = [f"cudnn-{torch.backends.cudnn.version()}"]
    else:
        name, libraries = device.type, []
    try:
        libraries.append(f"triton-{metadata.version('triton')}")
    except metadata.PackageNotFoundError:
        libraries.append("no-triton")
    return [name, f"torch-{torch.__version__}", *libraries, f"dyconvert-{__version__}"]
