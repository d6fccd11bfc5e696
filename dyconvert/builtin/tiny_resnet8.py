"""The ResNet-8 of MLPerf Tiny's image classification (Banbury et al. 2021, arXiv:2106.07597): 78 k parameters.

The module names are those of the weights of https://github.com/mlcommons/tiny, converted from TensorFlow. It takes RGB
of 0 to 255, not normalised. As TensorFlow pads, strided 3x3 convs pad below and to the right only.
"""

from torch import Tensor, nn
from torch.nn import functional as F

INPUT_SIZE = (3, 32, 32)
# TensorFlow's batch norms have it.
_EPS = 1e-3


class TinyBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: `[N, in, H, W]` to `[N, out, H / stride, W / stride]`, for even H and W."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        # TensorFlow's "same": one pixel in all where the stride is 2, and it goes to the far side.
        self.pad = nn.ZeroPad2d((0, 1, 0, 1)) if stride == 2 else nn.Identity()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=0 if stride == 2 else 1)
        self.bn1 = nn.BatchNorm2d(out_channels, eps=_EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(out_channels, eps=_EPS)
        self.short = nn.Identity() if stride == 1 else nn.Conv2d(in_channels, out_channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(self.pad(x))))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.short(x))


class TinyResNet8(nn.Module):
    """ResNet-8: `[N, 3, 32, 32]` RGB from 0 to 255, to `[N, num_classes]` logits."""

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(16, eps=_EPS)
        self.layer1 = TinyBlock(16, 16, stride=1)
        self.layer2 = TinyBlock(16, 32, stride=2)
        self.layer3 = TinyBlock(32, 64, stride=2)
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean(dim=(2, 3)))
