"""The CIFAR ResNets of He et al. 2016 (section 4.2), with shortcuts that have no parameters.

The module names are those of https://github.com/akamaster/pytorch_resnet_cifar10, so its weights fit:
`dyconvert builtin:cifar-resnet20 --weights resnet20-12fca82f.th`. They take RGB / 255, with mean (0.485, 0.456, 0.406)
and standard deviation (0.229, 0.224, 0.225).
"""

from torch import Tensor, nn
from torch.nn import functional as F

from dyconvert.errors import ModelError

INPUT_SIZE = (3, 32, 32)


class PadShortcut(nn.Module):
    """Every second pixel, and zero channels added, half on each side: `[N, C, H, W]` to `[N, 2C, H/2, W/2]`."""

    def __init__(self, added_channels: int):
        super().__init__()
        self.added_each_side = added_channels // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added_each_side, self.added_each_side))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: `[N, in, H, W]` to `[N, out, H / stride, W / stride]`."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Identity() if stride == 1 else PadShortcut(out_channels - in_channels)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """A ResNet of `6 * blocks_per_stage + 2` layers: `[N, 3, 32, 32]` to `[N, num_classes]` logits."""

    def __init__(self, blocks_per_stage: int, num_classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks_per_stage, stride=1)
        self.layer2 = _stage(16, 32, blocks_per_stage, stride=2)
        self.layer3 = _stage(32, 64, blocks_per_stage, stride=2)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))


def cifar_resnet(depth: int, num_classes: int = 10) -> CifarResNet:
    """A ResNet of `depth` layers: 20 has 0.27 M parameters, 32 0.46 M, 44 0.66 M, 56 0.86 M.

    Raises:
        ModelError: no such network has that many layers.
    """
    if depth < 8 or depth % 6 != 2:
        raise ModelError(f"A CIFAR ResNet has 6 n + 2 layers (8, 14, 20, ...), and not {depth}; give another depth.")
    return CifarResNet((depth - 2) // 6, num_classes)
