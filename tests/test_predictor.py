"""The predictor's parameters are as torch's tools want them, and its large linear computes what a plain one does."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from nets import ResidualNet, seeded
from safetensors.torch import load_file, save_file
from torch import nn
from varied import randomised

import dyconvert
from dyconvert.methods import get_method
from dyconvert.nn import CoefficientPredictor, native, native_library
from dyconvert.nn.linear import LargeLinear
from dyconvert.nn.mixture import Sizes

# float32's rounding of sums of 512 products.
FLOAT32 = 1e-5


def large() -> CoefficientPredictor:
    """One linear, of more weights than lie in a core's cache."""
    torch.manual_seed(0)
    predictor = CoefficientPredictor(512, [Sizes(6, 256), Sizes(6, 128)], get_method("dynet", reduction=0))
    nn.init.normal_(predictor.linear.weight, std=0.05)
    nn.init.normal_(predictor.linear.bias)
    return predictor


def plain(predictor: CoefficientPredictor, x: torch.Tensor) -> torch.Tensor:
    linear = predictor.linear
    return F.linear(x, linear.weight, linear.bias)


def test_only_large_linears_are_of_a_class_of_their_own() -> None:
    assert type(large().linear) is LargeLinear
    assert type(CoefficientPredictor(16, [Sizes(6, 8)], get_method("dynet")).linear) is nn.Linear


@pytest.mark.skipif(native_library.library() is None, reason="there are no compiled kernels here")
def test_the_kernels_compute_it_for_a_few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    linear = native.linear

    def count(x: torch.Tensor, *others: torch.Tensor | None) -> torch.Tensor | None:
        calls.append(len(x))
        return linear(x, *others)

    monkeypatch.setattr(native, "linear", count)
    predictor = large()
    predictor.linear(torch.randn(1, 512))  # with gradients: autograd is to see it
    with torch.no_grad():
        for images in (1, 8, 9):
            predictor.linear(torch.randn(images, 512))
    assert calls == [1, 8]


@pytest.mark.parametrize("images", [0, 1, 2, 5, 8, 9, 64])
def test_a_large_linear_computes_what_a_plain_one_does(images: int) -> None:
    predictor = large()
    x = torch.randn(images, 512)
    with torch.no_grad():
        expected, computed = plain(predictor, x), predictor.linear(x)
    assert computed.shape == expected.shape
    torch.testing.assert_close(computed, expected, rtol=FLOAT32, atol=FLOAT32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_and_autocast(dtype: torch.dtype) -> None:
    predictor = large()
    x = torch.randn(2, 512)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert predictor.linear(x).dtype == torch.bfloat16
    predictor.to(dtype)
    with torch.no_grad():
        assert torch.equal(predictor.linear(x.to(dtype)), plain(predictor, x.to(dtype)))


class Experts(nn.Module):
    """What mixes the experts, of all convs, as one tensor: tracers take no named tuples with None."""

    def __init__(self, predictor: CoefficientPredictor) -> None:
        super().__init__()
        self.predictor = predictor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixtures = self.predictor(x)
        return torch.cat([mixtures[0].experts, mixtures[1].experts], 2)


def test_gradients_and_traces_go_through_it() -> None:
    predictor = large()
    model = Experts(predictor)
    x = torch.randn(2, 512, 1, 1)
    model(x).sum().backward()
    assert predictor.linear.weight.grad.any()
    with torch.no_grad():
        expected = model(x)
        program = torch.export.export(model, (x,)).module()
        for other in (torch.jit.trace(model, x), program, torch.fx.symbolic_trace(model)):
            torch.testing.assert_close(other(x), expected, rtol=FLOAT32, atol=FLOAT32)
        weight = predictor.linear.weight * 2
        torch.testing.assert_close(
            torch.func.functional_call(predictor.linear, {"weight": weight}, (x.flatten(1),)),
            F.linear(x.flatten(1), weight, predictor.linear.bias),
            rtol=FLOAT32,
            atol=FLOAT32,
        )


def test_the_bias_may_be_absent() -> None:
    linear = LargeLinear(512, 2048, bias=False)
    x = torch.randn(1, 512)
    with torch.no_grad():
        torch.testing.assert_close(linear(x), F.linear(x, linear.weight), rtol=FLOAT32, atol=FLOAT32)


# ---- What other people's tools do with parameters ----


@pytest.fixture(params=["dynet", "condconv", "dyconv"])
def dynamic(request: pytest.FixtureRequest) -> nn.Module:
    return randomised(dyconvert.convert(seeded(ResidualNet), method=request.param))


def test_parameters_are_contiguous(dynamic: nn.Module) -> None:
    assert all(p.is_contiguous() for p in dynamic.parameters())
    vector = nn.utils.parameters_to_vector(dynamic.parameters())
    nn.utils.vector_to_parameters(vector + 1, dynamic.parameters())
    assert torch.equal(nn.utils.parameters_to_vector(dynamic.parameters()), vector + 1)


def test_safetensors_own_functions(dynamic: nn.Module, tmp_path: Path) -> None:
    save_file(dynamic.state_dict(), tmp_path / "m.safetensors")
    again = load_file(tmp_path / "m.safetensors")
    assert all(torch.equal(t, again[name]) for name, t in dynamic.state_dict().items())


def test_lbfgs(dynamic: nn.Module) -> None:
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.LBFGS(dynamic.parameters(), lr=0.1, max_iter=4)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = dynamic(x).square().mean()
        value.backward()
        return value

    before = optimizer.step(loss)
    assert loss() < before


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo")
def test_fully_shard(dynamic: nn.Module, one_process: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    dynamic.train()
    expected = dynamic(x)
    mesh = init_device_mesh("cpu", (1,))
    for block in dynamic.layer1:
        fully_shard(block, mesh=mesh)
    fully_shard(dynamic, mesh=mesh)
    computed = dynamic(x)
    torch.testing.assert_close(computed, expected)
    computed.sum().backward()


def test_whole_models_saved_with_a_transposed_weight_go_on_working(dynamic: nn.Module) -> None:
    """As `torch.save(model)` of an earlier version has them."""
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    dynamic.eval()
    with torch.no_grad():
        expected = dynamic(x)
        for module in dynamic.modules():
            if isinstance(module, CoefficientPredictor):
                module.linear.weight = nn.Parameter(module.linear.weight.detach().t().contiguous().t())
        torch.testing.assert_close(dynamic(x), expected)
