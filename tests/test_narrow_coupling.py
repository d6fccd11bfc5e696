"""Which channels are narrowed together where forwards concatenate, throw away and count: right, or kept by name."""

import pytest
import torch
from narrow_nets import Trunk
from nets import seeded
from test_narrow import images, settled
from test_narrow_programs import narrowed
from torch import Tensor, nn

import dyconvert
from dyconvert import ModelError

pytest.importorskip("torch_pruning")


class WideAndParts(Trunk):
    """A wide map, and two beside each other that are added to it, or one with a part of itself."""

    def __init__(self, itself: bool) -> None:
        super().__init__()
        self.itself = itself
        self.wide, self.join = nn.Conv2d(32, 40, 3, padding=1), nn.Conv2d(40, 32, 1)
        self.first, self.second = nn.Conv2d(32, 24, 1), nn.Conv2d(32, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        wide, first, second = self.wide(x), self.first(x), self.second(x)
        beside = torch.cat([first, first[:, :16] if self.itself else second], 1)
        return self.head(self.join((wide + beside).relu()).mean((2, 3)))


@pytest.mark.parametrize("itself", [False, True])
def test_channels_that_go_along_with_different_places_stay(itself):
    model = settled(seeded(WideAndParts, itself))
    record = dyconvert.narrow(model, width=0.5, static=True).dyconvert_narrowing
    kept = {group.name: group.kept for group in record.groups}
    assert ("sliced" if itself else "go along with more others") in kept["wide"]
    assert kept["conv1"] is None


class Maxout(Trunk):
    """The larger one of each pair of channels, whose number stands in the code."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = x.reshape(len(x), 16, 2, *x.shape[2:]).amax(2)
        return self.head(torch.cat([x, x], 1).mean((2, 3)))


def test_code_that_counts_on_the_number_of_channels_is_refused_by_name():
    with pytest.raises(ModelError, match="counts on their number"):
        dyconvert.narrow(settled(seeded(Maxout)), width=0.5, data=images(48), static=True)


class UnusedBranch(Trunk):
    """A head at the side, whose output is thrown away, reads channels that become fewer."""

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Sequential(nn.Conv2d(48, 20, 3), nn.ReLU(), nn.Conv2d(20, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.bn1(self.conv1(x)).relu()
        self.side(y)
        return self.head((self.bn2(self.conv2(y)) + self.short(x)).relu().mean((2, 3)))


def test_layers_whose_output_is_not_used_follow():
    model = settled(seeded(UnusedBranch))
    narrow = narrowed(model, images(48))
    assert narrow.side[0].in_channels == narrow.conv1.out_channels == 24


class EfficientChannelAttention(Trunk):
    """A conv along the channels (Wang et al., CVPR 2020), which are its pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.along = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        gates = self.along(x.mean((2, 3)).unsqueeze(1)).squeeze(1).sigmoid()
        return self.head((x * gates[:, :, None, None]).mean((2, 3)))


def test_a_conv_along_the_channels_keeps_them():
    record = narrowed(settled(seeded(EfficientChannelAttention)), images(48)).dyconvert_narrowing
    kept = {group.name: group.kept for group in record.groups}
    assert "along another dimension" in kept["conv2"]
    assert kept["conv1"] is None
