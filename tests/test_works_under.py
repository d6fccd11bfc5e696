"""A converted model under what training and inference do with models."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import zoo
from nets import BasicBlock, FlatNet, ResidualNet, image, seeded, trained
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import dyconvert

# float64: rounding, with strategies that add up in another order.
EXACT = 1e-10
METHODS = tuple(dyconvert.METHODS)


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)).item()


def gradients(model: nn.Module, output: Tensor) -> dict[str, Tensor]:
    """Of the sum of squares, by parameter."""
    model.zero_grad()
    output.double().square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor], limit: float = EXACT) -> None:
    assert first.keys() == second.keys()
    assert first
    for name, tensor in first.items():
        assert apart(tensor, second[name]) < limit, name


@pytest.fixture(params=METHODS)
def dynamic(request: pytest.FixtureRequest) -> nn.Module:
    """Converted, and moved as by training, in float64: its coefficients differ between images."""
    return trained(seeded(ResidualNet).double(), method=request.param, g=3)


X = image(4, dtype=torch.float64)


# ---- number formats


def test_bf16_autocast(dynamic: nn.Module) -> None:
    dynamic = dynamic.float().train()
    x = image(4)
    expected = dynamic(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = dynamic(x)
    # bfloat16 has 8 bits, 0.4 % an operation, and the net has a dozen.
    assert apart(output, expected) < 0.05
    found = gradients(dynamic, output)
    assert all(g.isfinite().all() and g.dtype == torch.float32 for g in found.values())
    assert found.keys() == dict(dynamic.named_parameters()).keys()


@pytest.mark.parametrize("when", ["before", "after"])
# The numbers' precision, times what a dozen operations make of it.
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-6), (torch.float16, 0.02), (torch.bfloat16, 0.1)])
def test_other_number_formats(dtype: torch.dtype, limit: float, when: str) -> None:
    model = seeded(ResidualNet)
    dynamic = (
        dyconvert.convert(copy.deepcopy(model).to(dtype)) if when == "before" else dyconvert.convert(model).to(dtype)
    )
    assert {t.dtype for t in dynamic.state_dict().values() if t.is_floating_point()} == {dtype}
    output = dynamic(image(4, dtype=dtype))
    assert output.dtype == dtype
    assert apart(output, model(image(4))) < limit
    assert all(g.isfinite().all() for g in gradients(dynamic, output).values())


# ---- gradient checkpointing


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_a_block(dynamic: nn.Module, reentrant: bool) -> None:
    block = dynamic.layer1[1].train()
    x = torch.randn(4, 8, 6, 6, dtype=torch.float64, requires_grad=True)
    expected = gradients(block, block(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(gradients(block, checkpoint(block, x, use_reentrant=reentrant)), expected)


@pytest.mark.parametrize("name", ["resnet18", "test_efficientnet", "test_convnext"])
def test_checkpointing_as_timm_does_it(name: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    dynamic = trained(timm.create_model(name, num_classes=5).double(), g=2).train()
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    expected = gradients(dynamic, dynamic(x))
    dynamic.set_grad_checkpointing(True)
    if name == "test_convnext":
        # Its stage is the block, and runs parts of itself again in backward, where no coefficients are handed.
        with pytest.raises(RuntimeError, match=r"checkpointing .* before converting"):
            gradients(dynamic, dynamic(x))
        return
    assert_same(gradients(dynamic, dynamic(x)), expected)


def test_checkpointing_inside_of_a_block_that_is_on_before_the_conversion() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("test_convnext", num_classes=5).double().train()
    model.set_grad_checkpointing(True)
    dynamic = trained(model, g=2).train()
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    found = gradients(dynamic, dynamic(x))
    dynamic.set_grad_checkpointing(False)
    assert_same(found, gradients(dynamic, dynamic(x)))


# ---- several processes


def _on_its_share(rank: int, folder: str, method: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        # In eval mode, so that batch norm takes the same statistics of half the batch.
        model = trained(seeded(ResidualNet).double(), method=method).eval()
        parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)
        for _ in range(2):  # the second would fail if a parameter had been unused in the first
            model.zero_grad()
            parallel(X[2 * rank : 2 * rank + 2]).square().sum().backward()
        torch.save({name: p.grad for name, p in model.named_parameters()}, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch is built without gloo")
def test_two_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_on_its_share, (str(tmp_path), "dynet"), nprocs=2)
    model = trained(seeded(ResidualNet).double(), method="dynet").eval()
    # The processes' gradients are averaged, of losses that are sums.
    expected = {name: g / 2 for name, g in gradients(model, model(X)).items()}
    for rank in (0, 1):
        assert_same(torch.load(tmp_path / f"{rank}.pt"), expected)


# ---- copies and functions


def test_functional_call(dynamic: nn.Module) -> None:
    others = {name: p.detach() + 0.01 for name, p in dynamic.named_parameters()}
    output = torch.func.functional_call(dynamic, others, (X,))
    moved = copy.deepcopy(dynamic)
    moved.load_state_dict(others, strict=False)
    assert apart(output, moved(X)) < EXACT

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(dynamic, parameters, (X,)).square().sum()

    assert_same(torch.func.grad(loss)(others), gradients(moved, moved(X)))


def test_moving_average_of_weights(dynamic: nn.Module) -> None:
    average = torch.optim.swa_utils.AveragedModel(dynamic, avg_fn=lambda mean, new, n: 0.9 * mean + 0.1 * new)
    average.update_parameters(dynamic)
    before = copy.deepcopy(dynamic)
    assert apart(average(X), dynamic(X)) < EXACT
    gradients(dynamic, dynamic(X))
    torch.optim.SGD(dynamic.parameters(), lr=1e-3).step()
    average.update_parameters(dynamic)
    for name, p in average.module.named_parameters():
        expected = 0.9 * before.get_parameter(name) + 0.1 * dynamic.get_parameter(name)
        assert torch.allclose(p, expected, rtol=1e-12), name
    # The average is a model of its own.
    assert apart(average(X), dynamic(X)) > EXACT


def test_double_backward(dynamic: nn.Module) -> None:
    block = dynamic.layer1[1]
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(block, (x,), atol=1e-6, fast_mode=True)


def test_gradients_against_differences(dynamic: nn.Module) -> None:
    block = dynamic.layer1[1]
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, (x,), atol=1e-6)


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5"])
def test_symbolic_trace_of_a_whole_model(name: str) -> None:
    dynamic = trained(zoo.build(name).double())
    traced = torch.fx.symbolic_trace(dynamic)
    for batch in (1, 3):
        images = zoo.images(name, batch, torch.float64)
        assert apart(traced(images), dynamic(images)) < EXACT


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_without_gradients(dynamic: nn.Module, mode: Any) -> None:
    with mode():
        output = dynamic(X)
    assert apart(output, dynamic(X)) < EXACT


# ---- weights that aren't there, or aren't parameters


def test_on_the_meta_device_and_filled_later() -> None:
    with torch.device("meta"):
        model = ResidualNet()
    dynamic = dyconvert.convert(model.eval(), example=image())
    assert all(t.is_meta for t in dynamic.state_dict().values())
    filled = trained(seeded(ResidualNet))
    dynamic = dynamic.to_empty(device="cpu")
    dynamic.load_state_dict(filled.state_dict())
    assert torch.equal(dynamic(image()), filled(image()))


def test_lazy_modules_are_refused_with_what_to_do() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LazyConv2d(8, 3), nn.Conv2d(8, 8, 3))
    with pytest.raises(dyconvert.ModelError, match=r"1 is lazy .* Run a batch"):
        dyconvert.convert(model)
    model(torch.zeros(1, 3, 16, 16))
    x = image(dtype=torch.float32)
    assert dyconvert.verify(model, dyconvert.convert(model, example=x), x).relative < 1e-5


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


PARAMETRIZED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "a parametrization": lambda conv: parametrize.register_parametrization(conv, "weight", Doubled()) and conv,
    "the former weight_norm": torch.nn.utils.weight_norm,
    "the former spectral_norm": torch.nn.utils.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("kind", PARAMETRIZED)
def test_a_computed_weight_is_skipped_by_name_and_reason(kind: str) -> None:
    model = seeded(ResidualNet).double()
    PARAMETRIZED[kind](model.layer1[0].conv2)
    model.eval()
    plan = dyconvert.plan(model, example=X)
    entry = plan["layer1.0.conv2"]
    if not entry.convert:
        assert "weight" in entry.reason
    assert [conv.name for conv in plan.skipped] == ["stem", *([] if entry.convert else ["layer1.0.conv2"])]
    dynamic = dyconvert.convert(model, plan)
    assert dyconvert.verify(model, dynamic, X).relative < EXACT
    assert apart(dynamic.train()(X), model.train()(X)) < 1e-6  # batch statistics amplify rounding


# ---- what is trained


def test_frozen_weights_stay_frozen() -> None:
    model = seeded(ResidualNet)
    model.stem.requires_grad_(False)
    model.layer1[0].requires_grad_(False)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    dynamic = dyconvert.convert(model)
    assert {n for n, p in dynamic.named_parameters() if not p.requires_grad and "predictor" not in n} == frozen
    before = copy.deepcopy(dynamic.state_dict())
    optimizer = torch.optim.SGD([p for p in dynamic.parameters() if p.requires_grad], lr=0.1)
    F.cross_entropy(dynamic(image(4)), torch.arange(4)).backward()
    optimizer.step()
    for name in frozen:
        assert torch.equal(dynamic.state_dict()[name], before[name]), name
    assert not torch.equal(dynamic.layer1[1].conv1.weight, before["layer1.1.conv1.weight"])


@pytest.mark.parametrize("cls", [FlatNet, ResidualNet, lambda: nn.Sequential(nn.Conv2d(3, 4, 1), BasicBlock(4, 4))])
def test_every_parameter_gets_a_gradient(cls: Any) -> None:
    """What `find_unused_parameters=False` needs, and what weight decay alone would otherwise move."""
    dynamic = dyconvert.convert(seeded(cls), example=image()).train()
    gradients(dynamic, dynamic(image()))
    assert all(p.grad is not None for p in dynamic.parameters())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", [1, 2, 64])
def test_training_with_in_place_activations_after_the_convs(method: str, batch: int) -> None:
    """What a conv returns is overwritten, as where an in-place ReLU follows it."""

    def layers(inplace: bool) -> nn.Module:
        # Without biases: adding one would make a tensor of its own.
        shapes = [(3, 8, 1), (8, 8, 3, 1, 1), (8, 6, 1), (6, 6, 3, 2)]
        convs = [nn.Conv2d(*shape, bias=False) for shape in shapes]
        model = seeded(lambda: nn.Sequential(*[m for conv in convs for m in (conv, nn.ReLU(inplace))]))
        return trained(model.double(), method=method, g=2, example=image(dtype=torch.float64)).train()

    x = image(batch, dtype=torch.float64)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        first = layers(True)
        torch.manual_seed(0)
        second = layers(False)
    assert_same(gradients(first, first(x)), gradients(second, second(x)))
