"""Turn a pretrained CNN into a dynamic-convolution network that still computes the same outputs.

>>> import torchvision, dyconvert
>>> model = torchvision.models.resnet18()
>>> dynamic = dyconvert.convert(model, method="dynet", g=6)
"""

from dyconvert.checkpoint import load, save
from dyconvert.errors import (
    CheckpointError,
    DyconvertError,
    ExportError,
    ModelError,
    PlanError,
    RecipeError,
    TrainingError,
)
from dyconvert.exporting.export import export_onnx, export_torch
from dyconvert.exporting.exported import Exported
from dyconvert.finetuning import Recipe, finetune, load_recipe
from dyconvert.methods import METHODS, Method
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
from dyconvert.surgery.convert import convert, plan
from dyconvert.surgery.fuse import fuse
from dyconvert.surgery.pairing import pair_experts
from dyconvert.surgery.plan import Plan, PlannedBlock, PlannedConv
from dyconvert.surgery.trainable import set_trainable
from dyconvert.verify import Differences, verify
from dyconvert.version import __version__

__all__ = [
    "METHODS",
    "CheckpointError",
    "CoefficientPredictor",
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
    "Recipe",
    "RecipeError",
    "TrainingError",
    "__version__",
    "collapse",
    "convert",
    "export_onnx",
    "export_torch",
    "finetune",
    "fuse",
    "load",
    "load_recipe",
    "narrow",
    "pair_experts",
    "plan",
    "save",
    "set_trainable",
    "tune",
    "verify",
]
