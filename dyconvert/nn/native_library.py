"""The compiled kernels of `csrc/`: where their library is, loading it, and which instruction set it uses.

They are plain C functions in a library that is built when dyconvert is installed, if there is a C++ compiler. They
link against nothing of torch's: memory is handed over by address, and torch's own threads through the function
`torch_parallel_for` of its stable C interface, so that one build serves every torch that has it (2.10 on).
"""

import ctypes
import enum
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dyconvert.errors import DyconvertError
from dyconvert.torch_internals.operators import parallel_for

LIBRARY = Path(__file__).with_name("_native.so")
_ABI = 5  # as `csrc/native.cpp` has it


class Shape(ctypes.Structure):
    """The sizes and strides of a dynamic conv: `Shape` of `csrc/base/problem.h`."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            *("images", "in_channels", "height", "width"),
            *("out_channels", "out_height", "out_width"),
            *("g", "groups", "kernel_height", "kernel_width"),
            *("stride_y", "stride_x", "padding_y", "padding_x", "dilation_y", "dilation_x"),
            *("x_image", "x_channel", "x_row", "x_column"),
            *("out_channel", "out_pixel"),
            "bank_last",
            *("eta_image", "eta_expert", "eta_channel"),
            *("factor_groups", "threads"),
        )
    )


class Task(enum.IntEnum):
    """What a call of the kernels computes, as `csrc/interface.h` numbers it."""

    OUTPUT = 0
    INPUT_GRADIENT = 1
    BANK_GRADIENT = 2


class Kernel(enum.IntEnum):
    """Which kernel computes it, as `csrc/interface.h` numbers them."""

    WINOGRAD = 0
    PANELS = 1
    PLANES = 2
    DEPTHWISE = 3
    DEPTHWISE_LAST = 4
    TILE_PRODUCTS = 5
    PIXEL_PRODUCTS = 6
    DEPTHWISE_PRODUCTS = 7
    CHANNELS = 8


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None: not built, not for this torch, or switched off by `DYCONVERT_NATIVE=0` in the
    environment.

    Raises:
        DyconvertError: `DYCONVERT_NATIVE=1`, and they can't be loaded; or `DYCONVERT_CPU` names a target that this
            processor hasn't.
    """
    wish = os.environ.get("DYCONVERT_NATIVE")
    if wish == "0":
        return None
    loaded = _loaded()
    if isinstance(loaded, str):
        if wish == "1":
            raise DyconvertError(f"DYCONVERT_NATIVE=1 asks for the compiled kernels, but {loaded}")
        return None
    _use(loaded, os.environ.get("DYCONVERT_CPU") or _targets(loaded)[0])
    return loaded


def _loaded() -> ctypes.CDLL | str:
    """The library, or what keeps it from being used."""
    if not LIBRARY.exists():
        return f"{LIBRARY} isn't there. Install dyconvert again where there is a C++ compiler."
    if parallel_for() is None:
        return f"torch {torch.__version__} has no torch_parallel_for. Take torch 2.10 or later."
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return f"{LIBRARY} can't be loaded: {error}."
    if not hasattr(loaded, "dyconvert_abi") or (loaded.dyconvert_abi(), loaded.dyconvert_shape_bytes()) != (
        _ABI,
        ctypes.sizeof(Shape),
    ):
        return f"{LIBRARY} is of another version. Install dyconvert again."
    loaded.dyconvert_target_name.restype = ctypes.c_char_p
    for function, tensors, types in (
        (loaded.dyconvert_conv, 9, 2),
        (loaded.dyconvert_input_gradient, 5, 1),
        (loaded.dyconvert_bank_gradient, 8, 1),
    ):  # the shape, torch's threads, the tensors' addresses and their types; declared, calls are quicker
        function.argtypes = [ctypes.POINTER(Shape)] + [ctypes.c_void_p] * (1 + tensors) + [ctypes.c_int] * types
    loaded.dyconvert_linear.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int64] * 3 + [ctypes.c_int]
    loaded.dyconvert_path.argtypes = [ctypes.POINTER(Shape), ctypes.c_int, ctypes.c_int]
    return loaded


def _names(loaded: ctypes.CDLL) -> list[str]:
    """The names of all targets, in the order of their numbers."""
    names: list[str] = []
    while name := loaded.dyconvert_target_name(len(names)):
        names.append(name.decode())
    return names


def _targets(loaded: ctypes.CDLL) -> list[str]:
    return [name for number, name in enumerate(_names(loaded)) if loaded.dyconvert_target_runs_here(number)]


def _use(loaded: ctypes.CDLL, name: str) -> None:
    global _used
    if name not in _targets(loaded):
        raise DyconvertError(
            f"DYCONVERT_CPU={name}: there are no such kernels for this processor. "
            f"It can use {', '.join(_targets(loaded))}."
        )
    loaded.dyconvert_use(_names(loaded).index(name))
    _used = name


_used: str | None = None


def targets() -> list[str]:
    """The instruction sets that there are kernels for and this processor has, the best first; none without them."""
    return [] if library() is None else _targets(library())


def target() -> str | None:
    """The one that is used: the best, or what `DYCONVERT_CPU` in the environment says."""
    return None if library() is None else _used


@contextmanager
def using(name: str) -> Iterator[None]:
    """Within it, the kernels for `name`, one of :func:`targets`, are used by the whole process: for tests."""
    before = target()
    _use(library(), name)
    try:
        yield
    finally:
        _use(library(), before)
