"""pair_experts: coefficients that vary from the first step, and outputs that stay what they were."""

import copy

import pytest
import torch
from nets import FlatNet, ResidualNet, seeded
from torch import nn

import dyconvert
from dyconvert import CoefficientPredictor, DynamicConv

# Rounding of experts that add up in another order than before.
FLOAT64 = 1e-11


def images(count: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    # Brightness and contrast differ from image to image, as in photographs.
    scale = torch.rand(count, 3, 1, 1, generator=generator, dtype=torch.float64) + 0.5
    return torch.randn(count, 3, 16, 16, generator=generator, dtype=torch.float64) * scale + scale


def logits(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    seen = []
    watched = copy.deepcopy(model)
    for module in watched.modules():
        if isinstance(module, CoefficientPredictor):
            of_experts = torch.cat([torch.arange(size.total) < size.g * size.per for size in module.sizes])
            module.linear.register_forward_hook(
                lambda _, args, out, t=module.temperature, rows=of_experts: seen.append(out[:, rows] / t)
            )
    with torch.no_grad():
        watched(x)
    return seen


@pytest.mark.parametrize("net", [FlatNet, ResidualNet])
@pytest.mark.parametrize(
    ("method", "g"), [("dynet", 6), ("dynet", 3), ("condconv", 8), ("dyconv", 4), ("dyconv", 3), ("odconv", 4)]
)
def test_the_outputs_stay_while_the_coefficients_vary(net, method, g):
    static = seeded(net).double().eval()
    dynamic = dyconvert.convert(static, method=method, g=g)
    paired = dyconvert.pair_experts(copy.deepcopy(dynamic), images().split(16))
    unseen = images(80)[64:]
    assert dyconvert.verify(static, paired, unseen).relative < FLOAT64
    for z in logits(paired, images()):
        moving = z.std(0, unbiased=False)
        moving = moving[moving > 0]
        # All but the last of an odd number of sigmoid experts.
        assert len(moving) == z.shape[1] * (1 if dyconvert.METHODS[method].activation == "softmax" else g // 2 * 2 / g)
        torch.testing.assert_close(moving, torch.ones_like(moving))
        torch.testing.assert_close(z.mean(0), torch.zeros_like(z[0]), atol=1e-9, rtol=0)


def test_the_experts_of_a_pair_part_at_the_first_step():
    model = dyconvert.convert(seeded(ResidualNet).double(), g=6)
    dyconvert.pair_experts(model, images().split(16))
    model.train()(images()).square().sum().backward()
    for module in model.modules():
        if isinstance(module, DynamicConv):
            weight = module.weight.detach().unflatten(0, (6, -1))
            gradient = module.weight.grad.unflatten(0, (6, -1))
            assert torch.equal(weight[:3], weight[3:])
            assert (gradient[:3] - gradient[3:]).abs().max() > 1e-2 * gradient.abs().max()


def test_seed_and_spread():
    model = dyconvert.convert(seeded(FlatNet).double(), g=4)
    before = torch.get_rng_state()
    one, same, other = (
        dyconvert.pair_experts(copy.deepcopy(model), [images()], spread=2.0, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    for name, value in one.state_dict().items():
        assert torch.equal(value, same.state_dict()[name])
    first, second = logits(one, images())[0], logits(other, images())[0]
    assert not torch.allclose(first, second)
    torch.testing.assert_close(first.std(0, unbiased=False).max(), torch.tensor(2.0, dtype=torch.float64))


def test_g_1_and_a_collapsed_model():
    model = dyconvert.convert(seeded(FlatNet).double().eval(), g=1)
    assert dyconvert.verify(model, dyconvert.pair_experts(copy.deepcopy(model), [images()]), images()).absolute == 0
    paired = dyconvert.pair_experts(dyconvert.convert(seeded(FlatNet).double().eval(), g=6), [images()])
    assert dyconvert.verify(paired, dyconvert.collapse(paired, [images()]), images()).relative < FLOAT64


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ([], "holds no batch"),
        ([torch.randn(2, 5, 16, 16)], "rejects batch 0"),
        ([torch.full((1, 3, 16, 16), float("nan"))], "isn't finite"),
    ],
)
def test_bad_data_leaves_the_model_as_it_was(batches, said):
    model = dyconvert.convert(seeded(FlatNet))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(dyconvert.ModelError, match=said):
        dyconvert.pair_experts(model, batches)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_what_cannot_be_paired_is_refused():
    with pytest.raises(dyconvert.ModelError, match="no dynamic conv"):
        dyconvert.pair_experts(seeded(FlatNet), [images()])
    model = dyconvert.pair_experts(dyconvert.convert(seeded(FlatNet).double()), [images()])
    with pytest.raises(dyconvert.ModelError, match="before training"):
        dyconvert.pair_experts(model, [images()])
