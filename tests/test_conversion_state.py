"""A conversion leaves the model as it was, and the caller's contexts too; dynamic convs by hand."""

import pytest
import torch
from nets import image, seeded
from test_users_code import EXACT, Net, Two, X, convert, net
from torch import Tensor, nn

import dyconvert
from dyconvert.nn import DynamicConv2d

# ---- The model is as it was ----


class Counts(Two):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(x.mean().item() if not x.is_meta else 0.0)
        return super().forward(x)


def test_planning_and_converting_leave_the_state_alone() -> None:
    model = net(Counts())
    _, dynamic = dyconvert.plan(model, example=X), dyconvert.convert(model, example=X)
    for each in (model, dynamic):
        assert each.block.calls.item() == 0
        assert each.block.seen == []
    dynamic(X)
    assert (dynamic.block.calls.item(), len(dynamic.block.seen), model.block.seen) == (1, 1, [])


def test_an_inplace_conversion_that_fails_its_check_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net(Two())
    before = {name: type(m) for name, m in model.named_modules()}
    expected = model(X)
    # As if the expansion were wrong.
    monkeypatch.setattr("dyconvert.surgery.apply.expand", lambda weight, method, *_, **__: _wrong(weight, method.g))
    with pytest.raises(dyconvert.ModelError, match="doesn't compute what the original does"):
        dyconvert.convert(model, example=X, inplace=True)
    assert {name: type(m) for name, m in model.named_modules()} == before
    assert torch.equal(model(X), expected)
    assert not [key for key in vars(model) if key.startswith("dyconvert")]


def _wrong(weight: Tensor, g: int) -> Tensor:
    return weight.repeat(g, *[1] * (weight.dim() - 1)) + 0.1


def test_keyword_only_and_dict_examples() -> None:
    class Keywords(Net):
        def forward(self, *, image: Tensor) -> Tensor:
            return super().forward(image)

    torch.manual_seed(0)
    model = Keywords(Two()).double().eval()
    dynamic = dyconvert.convert(model, example={"image": X})
    assert dyconvert.verify(model, dynamic, {"image": X}).relative < EXACT


def test_an_empty_batch() -> None:
    for method in dyconvert.METHODS:
        _, dynamic = convert(net(Two()), method)
        assert dynamic(X[:0]).shape == (0, 8, 12, 12)
        dynamic(X[:0]).sum().backward()


def test_a_default_device_around_the_call() -> None:
    model = net(Two())
    with torch.device("meta"):
        dynamic = dyconvert.convert(model, example=X)
    assert not any(p.is_meta for p in dynamic.parameters())
    assert dyconvert.verify(model, dynamic, X).relative < EXACT


# ---- By hand ----


@pytest.mark.parametrize("method", dyconvert.METHODS)
def test_a_dynamic_conv_by_hand(method: str) -> None:
    torch.manual_seed(0)
    conv = DynamicConv2d(16, 32, 3, stride=2, padding=1, groups=2, g=4, method=method)
    static = nn.Conv2d(16, 32, 3, stride=2, padding=1, groups=2)
    x = torch.randn(64, 16, 9, 9)
    out = conv(x)
    assert out.shape == static(x).shape
    # Drawn so that a mixture is as large as a static conv's kernel: by chance not exactly.
    assert 0.7 < out.std() / static(x).std() < 1.4
    out.sum().backward()
    assert all(p.grad is not None for p in conv.parameters())
    up = dyconvert.DynamicConvTranspose2d(16, 8, 4, stride=2, padding=1, g=2)
    assert up(x).shape == (64, 8, 18, 18)


@pytest.mark.parametrize("method", ["dynet", "condconv", "dyconv"])
def test_every_conv_of_a_block_can_be_reset(method: str) -> None:
    dynamic = dyconvert.convert(net(Two()), method=method, example=X)
    torch.manual_seed(0)
    for conv in (dynamic.block.conv1, dynamic.block.conv2):
        before = conv.weight.detach().clone()
        conv.reset_parameters()
        assert not torch.equal(conv.weight, before)
        # What the experts mix to is spread as torch's own draw.
        mixed = conv.experts().sum(0) * conv.initial_coefficient
        own = nn.Conv2d(8, 8, 3).weight
        assert mixed.std().item() == pytest.approx(own.std().item(), rel=0.2)


class KnowsConvsById(nn.Module):
    """No copy of it computes the same: `id` is another one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.scales = {id(self.conv): 2.0}

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.stem(x)) * self.scales.get(id(self.conv), 1.0)


def test_the_result_is_compared_with_the_model_itself_not_with_a_copy() -> None:
    with pytest.raises(dyconvert.ModelError, match="doesn't compute what the original does"):
        dyconvert.convert(seeded(KnowsConvsById), example=image())


class Clamps(nn.Module):
    """Its forward writes into a parameter, past autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.scale = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Parameter(torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        self.scale.data.mul_(0.5)
        return self.conv(self.stem(x)) * self.scale


def test_what_the_check_runs_is_put_back() -> None:
    model = seeded(Clamps)
    dynamic = dyconvert.convert(model, example=image())
    assert (model.scale.item(), dynamic.scale.item()) == (3.0, 3.0)
