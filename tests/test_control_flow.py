"""Blocks whose forward looks at more than one map: never converted wrongly, whether they share a predictor or not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dyconvert

# Rounding in float64; a branch not taken shows as 0.1 and more.
EXACT = 1e-12


class Pair(nn.Module):
    """What the blocks have in common: two convs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)

    def both(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x).relu())


class OptionalShortcut(Pair):
    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        if shortcut is None:
            shortcut = x
        return self.both(x) + shortcut


class OptionalMask(Pair):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.both(x)
        return x * mask if isinstance(mask, Tensor) else x


class Flag(Pair):
    def forward(self, x: Tensor, doubled: bool = False) -> Tensor:
        return self.both(x) * (2 if doubled is True else 1)


class Text(Pair):
    def forward(self, x: Tensor, mode: str = "sum") -> Tensor:
        return self.both(x) * {"sum": 1, "twice": 2}.get(mode, 3)


class Keyword(Pair):
    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return self.both(x) * scale


class Options(Pair):
    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return self.both(x) * options.get("scale", 1.0)


class Keeps(Pair):
    """Leaves something on itself, for others to read."""

    def forward(self, x: Tensor) -> Tensor:
        self.features = self.both(x)
        return self.features


class Counts(Pair):
    """Changes what it already has."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean.add_(x.detach().mean())
        return self.both(x)


class BySize(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.both(x) if x.shape[-1] > 3 else self.conv2(x)


class ByValue(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(x) if x.mean() > 0 else self.both(x)


class ByMode(Pair):
    def forward(self, x: Tensor) -> Any:
        out = self.both(x)
        return out + self.conv1(x) if self.training else out


class Loop(Pair):
    def forward(self, x: Tensor, times: int = 2) -> Tensor:
        for _ in range(times):
            x = self.both(x)
        return x


class Tuple(Pair):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = self.conv1(x)
        return first, self.conv2(first)


class Net(nn.Module):
    def __init__(self, block: Callable[[], nn.Module], call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.block = block()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.block, self.stem(x))


CALLS: dict[str, tuple[type[Pair], Callable[[nn.Module, Tensor], Tensor]]] = {
    "without the shortcut": (OptionalShortcut, lambda block, x: block(x)),
    "with the shortcut": (OptionalShortcut, lambda block, x: block(x, x.sin())),
    "with and without the shortcut": (OptionalShortcut, lambda block, x: block(block(x, x.sin()))),
    "a shortcut that is given as None": (OptionalShortcut, lambda block, x: block(x, shortcut=None)),
    "without the mask": (OptionalMask, lambda block, x: block(x)),
    "with the mask": (OptionalMask, lambda block, x: block(x, x.sigmoid())),
    "with and without the mask": (OptionalMask, lambda block, x: block(block(x), mask=x.sigmoid())),
    "a flag": (Flag, lambda block, x: block(x, True)),
    "no flag": (Flag, lambda block, x: block(x)),
    "a flag, or none": (Flag, lambda block, x: block(block(x, doubled=True))),
    "a text": (Text, lambda block, x: block(x, "twice")),
    "two texts": (Text, lambda block, x: block(block(x, "twice"), "other")),
    "a keyword": (Keyword, lambda block, x: block(x, scale=3.0)),
    "keywords that differ": (Keyword, lambda block, x: block(block(x, scale=3.0))),
    "any keywords": (Options, lambda block, x: block(block(x, scale=3.0))),
    "what it keeps": (Keeps, lambda block, x: block(x) * block.features.mean()),
    "what it counts": (Counts, lambda block, x: block(x) * block.calls + block.mean),
    "the map's size": (BySize, lambda block, x: block(x[..., :3, :3]).mean() * block(x)),
    "the map's values": (ByValue, lambda block, x: block(x.abs()) + block(-x.abs())),
    "training": (ByMode, lambda block, x: block(x)),
    "a number of times": (Loop, lambda block, x: block(block(x, 1), 3)),
    "two outputs": (Tuple, lambda block, x: sum(block(x))),
}


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("what", CALLS)
def test_a_block_that_depends_on_more_than_its_map(what: str, given: bool) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return Net(*CALLS[what]).double().eval()

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 9, 9, generator=generator, dtype=torch.float64)
    dynamic = dyconvert.convert(build(), method="dynet", g=2, example=x if given else None)
    model = build()
    for training in (False, True, False):
        expected = model.train(training)(x)
        found = dynamic.train(training)(x)
        assert ((found - expected).abs().max() / expected.abs().max()).item() < EXACT


@pytest.mark.parametrize("what", CALLS)
def test_and_each_plan_says_why_its_convs_share_no_predictor(what: str) -> None:
    model = Net(*CALLS[what]).eval()
    plan = dyconvert.plan(model, method="dynet", example=torch.randn(2, 3, 9, 9))
    assert all(conv.block == "block" or conv.note for conv in plan.converted)
    assert len(plan.converted) == 2
