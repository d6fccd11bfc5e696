"""torchvision's models, each with random weights and the smallest input that it takes."""

from typing import Any

import torch
import torchvision
from torch import nn

# Their images, in pixels, where 64 is too few.
SIZES = {"inception_v3": 299, "maxvit_t": 224, "alexnet": 96, "efficientnet": 64, "vgg": 32}
FRAMES = {"mvit": (16, 224), "s3d": (16, 224), "swin3d": (4, 32), "r": (4, 32), "mc3": (4, 32)}

# Only their stem is a conv; `dyconvert` refuses them, as nothing else would become dynamic.
WITHOUT_CONVS = ("vit_", "swin")

# Over a gigabyte of weights, which six experts multiply.
TOO_LARGE = ("vit_h", "regnet_y_128gf", "regnet_y_32gf", "regnet_x_32gf", "regnet_y_16gf", "convnext_large")

SEGMENTATION = ("fcn", "deeplab", "lraspp")
DETECTION = ("rcnn", "retinanet", "fcos", "ssd", "raft")


def names() -> list[str]:
    """Every classification, segmentation, video and quantizable model that has convs to convert."""
    return [
        name
        for name in torchvision.models.list_models()
        if not name.startswith(WITHOUT_CONVS) and not any(part in name for part in DETECTION)
    ]


def build(name: str) -> nn.Module:
    """In eval mode, with random weights; dropout and drop-path don't drop."""
    options: dict[str, Any] = {"weights": None}
    if any(part in name for part in (*SEGMENTATION, *DETECTION)) and "raft" not in name:
        options["weights_backbone"] = None
    if "googlenet" in name or "inception" in name:
        options["init_weights"] = False
    if name.startswith("quantized_"):
        options["quantize"] = False
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, **options)
    for module in model.modules():
        if isinstance(module, (nn.Dropout, torchvision.ops.StochasticDepth)):
            module.p = 0.0
    return model.eval()


def images(name: str, batch: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    name = name.removeprefix("quantized_")
    if name in torchvision.models.list_models(module=torchvision.models.video):
        frames, size = next(shape for prefix, shape in FRAMES.items() if name.startswith(prefix))
        shape = (batch, 3, frames, size, size)
    else:
        size = next((size for prefix, size in SIZES.items() if name.startswith(prefix)), 64)
        shape = (batch, 3, size, size)
    return torch.randn(shape, generator=generator, dtype=dtype)
