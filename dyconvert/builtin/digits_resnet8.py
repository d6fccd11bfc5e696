"""A ResNet-8 for 8x8 digits: small enough to come with the package, and with data to measure it on.

The architecture is that of He et al. 2016 (section 4.2) with one basic block a stage. Its weights were
trained on 80 % of scikit-learn's digits by `python -m dyconvert.builtin.train_digits_resnet8`; the other
20 % are in `digits_test.safetensors`.

The digits are the test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, UCI
Machine Learning Repository, 1998, https://doi.org/10.24432/C50P49), used under CC BY 4.0.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

WEIGHTS = Path(__file__).with_name("digits_resnet8.safetensors")
TEST_SPLIT = Path(__file__).with_name("digits_test.safetensors")
INPUT_SIZE = (1, 8, 8)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: `[N, in, H, W]` to `[N, out, H / stride, W / stride]`."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class DigitsResNet8(nn.Module):
    """ResNet-8: `[N, 1, 8, 8]` grey levels from 0 (paper) to 1 (ink), to `[N, num_classes]` logits.

    The shipped weights are for a `width` of 16 channels in the first stage; the stages double it.
    """

    def __init__(self, num_classes: int = 10, width: int = 16):
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = BasicBlock(width, width)
        self.layer2 = BasicBlock(width, 2 * width, stride=2)
        self.layer3 = BasicBlock(2 * width, 4 * width, stride=2)
        self.fc = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean(dim=(2, 3)))


def load_digits_test() -> tuple[Tensor, Tensor]:
    """The digits that the weights were not trained on.

    Returns:
        Images `[360, 1, 8, 8]` (float32, 0 to 1, as `DigitsResNet8` takes them) and labels `[360]` (int64).
    """
    split = load_file(TEST_SPLIT)
    return split["images"].float().div(16).unsqueeze(1), split["labels"].long()


def accuracy(model: nn.Module) -> float:
    """Top-1 accuracy of `model` on the test digits, in percent, measured in eval mode."""
    images, labels = load_digits_test()
    device = next((tensor.device for tensor in model.state_dict().values()), torch.device("cpu"))
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            predicted = model(images.to(device)).argmax(dim=1).cpu()
    finally:
        model.train(was_training)
    return 100.0 * (predicted == labels).float().mean().item()
