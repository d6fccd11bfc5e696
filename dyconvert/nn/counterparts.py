"""Which dynamic class stands for which static one."""

from torch import nn

from dyconvert.nn.convs import DynamicConv, DynamicConv1d, DynamicConv2d, DynamicConv3d
from dyconvert.nn.transposed import DynamicConvTranspose1d, DynamicConvTranspose2d, DynamicConvTranspose3d

# The class of a static conv, by class; both ways.
DYNAMIC_OF: dict[type[nn.Module], type[DynamicConv]] = {
    nn.Conv1d: DynamicConv1d,
    nn.Conv2d: DynamicConv2d,
    nn.Conv3d: DynamicConv3d,
    nn.ConvTranspose1d: DynamicConvTranspose1d,
    nn.ConvTranspose2d: DynamicConvTranspose2d,
    nn.ConvTranspose3d: DynamicConvTranspose3d,
}
STATIC_OF: dict[type[DynamicConv], type[nn.Module]] = {dynamic: static for static, dynamic in DYNAMIC_OF.items()}
