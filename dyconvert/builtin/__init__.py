"""The package's own models: one comes with its weights, of the others the user has the file."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import nn

from dyconvert.builtin import cifar_resnet, tiny_resnet8
from dyconvert.builtin.cifar_resnet import CifarResNet
from dyconvert.builtin.digits_resnet8 import (
    INPUT_SIZE,
    WEIGHTS,
    BasicBlock,
    DigitsResNet8,
    accuracy,
    load_digits_test,
)
from dyconvert.builtin.tiny_resnet8 import TinyResNet8

__all__ = [
    "MODELS",
    "BasicBlock",
    "BuiltinModel",
    "CifarResNet",
    "DigitsResNet8",
    "TinyResNet8",
    "accuracy",
    "load_digits_test",
]


class BuiltinModel(NamedTuple):
    """How to build a model of the package, and where its weights are.

    Attributes:
        input_size: (C, H, W).
        weights_name, weights_path: of the weight set that comes with the package; None where none does.
        file_name: the weights file's name where it is published, by which a folder of weights is searched.
        origin: where it is published.
    """

    factory: Callable[..., nn.Module]
    input_size: tuple[int, ...]
    weights_name: str | None = None
    weights_path: Path | None = None
    file_name: str | None = None
    origin: str | None = None


_CIFAR_RESNETS = {
    20: "resnet20-12fca82f.th",
    32: "resnet32-d509ac18.th",
    44: "resnet44-014dd654.th",
    56: "resnet56-4bfd9763.th",
}

MODELS = {
    "digits-resnet8": BuiltinModel(DigitsResNet8, INPUT_SIZE, "digits", WEIGHTS),
    "tiny-resnet8": BuiltinModel(
        TinyResNet8, tiny_resnet8.INPUT_SIZE, file_name="resnet8.pt", origin="https://github.com/mlcommons/tiny"
    ),
    **{
        f"cifar-resnet{depth}": BuiltinModel(
            partial(cifar_resnet.cifar_resnet, depth),
            cifar_resnet.INPUT_SIZE,
            file_name=file_name,
            origin="https://github.com/akamaster/pytorch_resnet_cifar10",
        )
        for depth, file_name in _CIFAR_RESNETS.items()
    },
}
