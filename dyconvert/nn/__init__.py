"""The code that runs after conversion: dynamic convs, predictors, kernels. It knows nothing of surgery."""

from dyconvert.nn.convs import DynamicConv, DynamicConv1d, DynamicConv2d, DynamicConv3d
from dyconvert.nn.dispatch import dynamic_conv
from dyconvert.nn.predictor import CoefficientPredictor
from dyconvert.nn.transposed import (
    DynamicConvTranspose,
    DynamicConvTranspose1d,
    DynamicConvTranspose2d,
    DynamicConvTranspose3d,
)

__all__ = [
    "CoefficientPredictor",
    "DynamicConv",
    "DynamicConv1d",
    "DynamicConv2d",
    "DynamicConv3d",
    "DynamicConvTranspose",
    "DynamicConvTranspose1d",
    "DynamicConvTranspose2d",
    "DynamicConvTranspose3d",
    "dynamic_conv",
]
