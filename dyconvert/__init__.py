"""Turn a pretrained CNN into a dynamic-convolution network that still computes the same outputs.

>>> import torchvision, dyconvert
>>> model = torchvision.models.resnet18()
>>> dynamic = dyconvert.convert(model, method="dynet", g=6)
"""

import importlib
import random

from dyconvert.version import __version__

# Type checkers take this name for true. Importing it from typing would double the time that this module takes.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any

    from dyconvert.checkpoint import load, push, save
    from dyconvert.differences import Differences, verify
    from dyconvert.errors import (
        CheckpointError,
        DyconvertError,
        ExportError,
        ModelError,
        PlanError,
        RecipeError,
        TrainingError,
    )
    from dyconvert.exporting.executorch_pte import export_executorch
    from dyconvert.exporting.export import export_onnx, export_torch
    from dyconvert.exporting.exported import Exported
    from dyconvert.exporting.openvino_ir import export_openvino
    from dyconvert.finetuning import Recipe, finetune, load_recipe
    from dyconvert.methods import METHODS, Method
    from dyconvert.models.preprocess import preprocessing
    from dyconvert.narrowing.narrow import narrow
    from dyconvert.narrowing.record import Narrowing
    from dyconvert.nn import (
        CoefficientPredictor,
        DynamicConv,
        DynamicConv1d,
        DynamicConv2d,
        DynamicConv3d,
        DynamicConvTranspose1d,
        DynamicConvTranspose2d,
        DynamicConvTranspose3d,
    )
    from dyconvert.nn.tune import tune
    from dyconvert.surgery.collapse import collapse
    from dyconvert.surgery.compress import Compression, compress
    from dyconvert.surgery.convert import convert, plan
    from dyconvert.surgery.fuse import fuse
    from dyconvert.surgery.pairing import pair_experts
    from dyconvert.surgery.plan import Plan, PlannedBlock, PlannedConv
    from dyconvert.surgery.trainable import set_trainable
    from dyconvert.transforms import Preprocessing

# Where each name is defined. A name's module is imported when the name is first asked for: torch and all that stands on
# it take seconds to import. Type checkers read the imports above instead; a test compares the two.
_HOMES = {
    "checkpoint": ("load", "push", "save"),
    "differences": ("Differences", "verify"),
    "errors": (
        "CheckpointError",
        "DyconvertError",
        "ExportError",
        "ModelError",
        "PlanError",
        "RecipeError",
        "TrainingError",
    ),
    "exporting.executorch_pte": ("export_executorch",),
    "exporting.export": ("export_onnx", "export_torch"),
    "exporting.exported": ("Exported",),
    "exporting.openvino_ir": ("export_openvino",),
    "finetuning": ("Recipe", "finetune", "load_recipe"),
    "methods": ("METHODS", "Method"),
    "models.preprocess": ("preprocessing",),
    "narrowing.narrow": ("narrow",),
    "narrowing.record": ("Narrowing",),
    "nn": (
        "CoefficientPredictor",
        "DynamicConv",
        "DynamicConv1d",
        "DynamicConv2d",
        "DynamicConv3d",
        "DynamicConvTranspose1d",
        "DynamicConvTranspose2d",
        "DynamicConvTranspose3d",
    ),
    "nn.tune": ("tune",),
    "surgery.collapse": ("collapse",),
    "surgery.compress": ("Compression", "compress"),
    "surgery.convert": ("convert", "plan"),
    "surgery.fuse": ("fuse",),
    "surgery.pairing": ("pair_experts",),
    "surgery.plan": ("Plan", "PlannedBlock", "PlannedConv"),
    "surgery.trainable": ("set_trainable",),
    "transforms": ("Preprocessing",),
}
_HOME_OF = {name: f"dyconvert.{home}" for home, names in _HOMES.items() for name in names}
# `import dyconvert` has always brought these.
_PACKAGES = ("analysis", "builtin", "exporting", "finetuning", "models", "narrowing", "nn", "report", "surgery")

__all__ = [
    "METHODS",
    "CheckpointError",
    "CoefficientPredictor",
    "Compression",
    "Differences",
    "DyconvertError",
    "DynamicConv",
    "DynamicConv1d",
    "DynamicConv2d",
    "DynamicConv3d",
    "DynamicConvTranspose1d",
    "DynamicConvTranspose2d",
    "DynamicConvTranspose3d",
    "ExportError",
    "Exported",
    "Method",
    "ModelError",
    "Narrowing",
    "Plan",
    "PlanError",
    "PlannedBlock",
    "PlannedConv",
    "Preprocessing",
    "Recipe",
    "RecipeError",
    "TrainingError",
    "__version__",
    "collapse",
    "compress",
    "convert",
    "export_executorch",
    "export_onnx",
    "export_openvino",
    "export_torch",
    "finetune",
    "fuse",
    "load",
    "load_recipe",
    "narrow",
    "pair_experts",
    "plan",
    "preprocessing",
    "push",
    "save",
    "set_trainable",
    "tune",
    "verify",
]


def __getattr__(name: str) -> "Any":
    if name in _HOME_OF:
        # Rich draws from Python's generator when it is imported; the user's draws are not to depend on that.
        state = random.getstate()
        try:
            value = getattr(importlib.import_module(_HOME_OF[name]), name)
        finally:
            random.setstate(state)
        globals()[name] = value
        return value
    if name in _PACKAGES:
        return importlib.import_module(f"dyconvert.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})
