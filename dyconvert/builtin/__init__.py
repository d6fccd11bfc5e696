"""Models whose weights come with the package: nothing to download."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import nn

from dyconvert.builtin.digits_resnet8 import (
    INPUT_SIZE,
    WEIGHTS,
    BasicBlock,
    DigitsResNet8,
    accuracy,
    load_digits_test,
)

__all__ = ["MODELS", "BasicBlock", "BuiltinModel", "DigitsResNet8", "accuracy", "load_digits_test"]


class BuiltinModel(NamedTuple):
    """How to build a model of the package, and its one weight set. `input_size` is (C, H, W)."""

    factory: Callable[..., nn.Module]
    weights_name: str
    weights_path: Path
    input_size: tuple[int, ...]


MODELS = {"digits-resnet8": BuiltinModel(DigitsResNet8, "digits", WEIGHTS, INPUT_SIZE)}
