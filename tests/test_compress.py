"""compress: experts and predictors in fewer bits, what they compute, and what can be done with them."""

import copy
import json
from contextlib import nullcontext

import pytest
import torch
from nets import ResidualNet, seeded
from torch import nn
from varied import randomised, with_statistics

import dyconvert
from dyconvert.analysis.flops import tensor_bytes
from dyconvert.nn import dispatch, native, native_library
from dyconvert.nn.linear import CompressedLinear
from dyconvert.surgery.compress import TOLERANCE

DTYPES = {"int8": torch.int8, "bfloat16": torch.bfloat16}
# The bars, for trained networks.
BARS = {"int8": 1e-2, "bfloat16": 2e-3}
TARGETS = native_library.targets() or [None]


def images(batch=2, size=24):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


def moved(model: nn.Module, method="dynet", **choices) -> nn.Module:
    """A converted model whose experts and coefficients are no conversion's any more."""
    dynamic = randomised(dyconvert.convert(model, method=method, diversity=0.5, **choices))
    with torch.random.fork_rng(devices=()), torch.no_grad():
        torch.manual_seed(3)
        for conv in (m for m in dynamic.modules() if isinstance(m, dyconvert.DynamicConv)):
            conv.weight.add_(0.2 * conv.weight.std() * torch.randn_like(conv.weight))
    return with_statistics(dynamic).eval()


@pytest.mark.parametrize("method", dyconvert.METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_computes_nearly_the_same(net, dtype, method):
    dynamic = moved(net, method)
    small = dyconvert.compress(dynamic, dtype, images())
    assert 0 < small.dyconvert_compression.difference < BARS[dtype]
    assert type(small) is type(net)
    assert not small.training
    for batch in (1, 3, 40):
        assert 0 < dyconvert.verify(dynamic, small, images(batch)).relative < BARS[dtype]
    # The model given is as it was.
    assert all(p.dtype == torch.float32 for p in dynamic.parameters())
    assert dynamic.layer1[0].conv1.mean is None


def test_equal_coefficients_lose_nothing(net):
    """The mean takes up what the differences lose together: a conversion that wasn't trained stays exact."""
    dynamic = dyconvert.convert(net).eval()
    assert dyconvert.verify(dynamic, dyconvert.compress(dynamic, "int8"), images()).relative < 1e-5


def test_three_times_the_original():
    model = nn.Sequential(*(nn.Conv2d(64, 64, 3, padding=1) for _ in range(4)))
    dynamic = dyconvert.convert(model, g=6, include_stem=True, example=torch.randn(2, 64, 8, 8))
    small = dyconvert.compress(dynamic, "int8", torch.randn(2, 64, 8, 8))
    assert tensor_bytes(small) < 3 * tensor_bytes(model) < tensor_bytes(dynamic) / 2


CONVS = {
    "3x3": (nn.Conv2d(16, 24, 3, padding=1), (16, 9, 11)),
    "1x1": (nn.Conv2d(48, 24, 1, stride=2, bias=False), (48, 9, 11)),
    "groups": (nn.Conv2d(16, 24, 3, groups=2), (16, 9, 11)),
    "same": (nn.Conv2d(16, 24, (2, 3), padding="same"), (16, 9, 11)),
    "large depthwise": (nn.Conv2d(16, 32, 7, groups=16, padding=3), (16, 9, 11)),
    "1d": (nn.Conv1d(16, 24, 3), (16, 9)),
    "3d": (nn.Conv3d(16, 24, 3), (16, 5, 6, 7)),
    "transposed": (nn.ConvTranspose2d(16, 24, 3, stride=2, groups=2), (16, 9, 11)),
    "transposed 1d": (nn.ConvTranspose1d(16, 24, 5), (16, 9)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", CONVS)
def test_every_kind_of_conv(kind, dtype):
    """By the kernels that read it as it is, in both memory formats, as by plain operations that unpack it."""
    conv, shape = CONVS[kind]
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    for method in ("dynet", "condconv"):
        dynamic = moved(nn.Sequential(conv), method, g=3, include_stem=True, example=x)
        small = dyconvert.compress(dynamic, dtype, x)
        assert small[0].weight.dtype == DTYPES[dtype]
        assert 0 < dyconvert.verify(dynamic, small, x).relative < BARS[dtype]
        with dispatch.force("unfold"), torch.no_grad():
            plain = small(x)
        for target in TARGETS:
            with native_library.using(target) if target else nullcontext(), torch.no_grad():
                assert (small(x) - plain).abs().max() < 1e-5 * plain.abs().max()
                if x.dim() == 4:
                    last = copy.deepcopy(small).to(memory_format=torch.channels_last)
                    found = last(x.to(memory_format=torch.channels_last))
                    assert (found - plain).abs().max() < 1e-5 * plain.abs().max()


@pytest.mark.skipif(native_library.library() is None, reason="there are no compiled kernels here")
def test_is_never_unpacked_by_the_kernels(net, monkeypatch):
    small = dyconvert.compress(moved(net), "int8", images())

    def refuse(*args, **options):
        raise AssertionError("unpacked")

    layers = []
    linear = native.linear
    monkeypatch.setattr(dispatch, "unpacked", refuse)
    monkeypatch.setattr(native, "linear", lambda *args: layers.append(linear(*args)) or layers[-1])
    with torch.no_grad():
        small(images())
    assert layers
    assert all(out is not None for out in layers)


def test_short_kernels_stay(net):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3))
    small = dyconvert.compress(dyconvert.convert(model, example=images()), "int8", images())
    assert small[1].mean is None
    assert small[1].weight.dtype == torch.float32
    assert small[2].weight.dtype == torch.int8


@pytest.mark.parametrize("dtype", DTYPES)
def test_saved_and_loaded(net, dtype, tmp_path):
    dynamic = moved(net)
    small = dyconvert.compress(dynamic, dtype, images())
    dyconvert.save(small, tmp_path / "small")
    loaded = dyconvert.load(tmp_path / "small", seeded(ResidualNet))
    assert loaded.dyconvert_compression == small.dyconvert_compression
    assert dyconvert.verify(small, loaded, images()).absolute == 0
    assert not any(p.requires_grad for p in loaded.parameters())
    dyconvert.save(dynamic, tmp_path / "large")
    size = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in ("small", "large")}
    assert size["small"] < size["large"] * {"int8": 0.5, "bfloat16": 0.75}[dtype]
    # One without a compression says nothing of it, for older versions.
    assert "compression" not in json.loads((tmp_path / "large" / "dyconvert.json").read_text())


@pytest.mark.parametrize("dtype", DTYPES)
def test_fused_collapsed_and_compiled(net, dtype):
    small = dyconvert.compress(moved(net), dtype, images())
    fused = dyconvert.fuse(small)
    assert dyconvert.verify(small, fused, images()).relative < 1e-5 if dtype == "int8" else 5e-3
    static = dyconvert.collapse(small, [images()])
    assert all(p.dtype == torch.float32 for p in static.parameters())
    assert not hasattr(static, "dyconvert_compression")
    compiled = torch.compile(small, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert (compiled(images()) - small(images())).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        ("int8", {}),
        ("bfloat16", {}),
        ("int8", {"dynamic_batch": False}),
        ("bfloat16", {"dynamic_batch": False, "fp16": True}),
    ],
    ids=str,
)
def test_exported_to_onnx(net, options, dtype, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    dynamic = moved(net, "condconv" if options else "dynet")
    small = dyconvert.compress(dynamic, dtype, images())
    done = dyconvert.export_onnx(dyconvert.fuse(small), tmp_path / "m.onnx", images(), **options)
    assert done.difference < (5e-2 if options.get("fp16") else 1e-4)
    kinds = [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]
    layers = sum(isinstance(m, CompressedLinear) for m in small.modules())
    convs = sum(isinstance(m, dyconvert.DynamicConv) and m.mean is not None for m in small.modules())
    assert kinds.count("DequantizeLinear") == (layers + convs if dtype == "int8" else 0)
    if not options.get("fp16"):  # beside which the nodes of so small a model weigh more
        assert done.bytes < dyconvert.export_onnx(dynamic, tmp_path / "large.onnx", images(), **options).bytes


def test_exported_to_torch(net, tmp_path):
    small = dyconvert.compress(moved(net), "int8", images())
    assert dyconvert.export_torch(small, tmp_path / "m.pt2", images()).difference < 1e-4


def test_cannot_be_trained(net):
    small = dyconvert.compress(moved(net), "int8", images())
    with pytest.raises(dyconvert.ModelError, match=r"can't be trained"):
        small.train()(images())
    with torch.no_grad():
        small(images())  # as calibrating batch norms does
    for change in (lambda m: dyconvert.set_trainable(m, "all"), lambda m: dyconvert.pair_experts(m, [images()])):
        with pytest.raises(dyconvert.ModelError, match=r"can't be trained"):
            change(small)
    with pytest.raises(dyconvert.ModelError, match="compressed already"):
        dyconvert.compress(small, "int8")


def test_gradients_of_its_input(net):
    """As saliency maps need them: by plain operations."""
    small = dyconvert.compress(moved(net), "int8", images())
    x = images().requires_grad_()
    small(x).square().sum().backward()
    assert x.grad.abs().sum() > 0


def test_what_is_refused(net):
    with pytest.raises(dyconvert.ModelError, match="no dynamic conv"):
        dyconvert.compress(net)
    dynamic = moved(net)
    with pytest.raises(dyconvert.ModelError, match="int8 or bfloat16, not 'int4'"):
        dyconvert.compress(dynamic, "int4")
    dynamic.layer1[0].conv1.weight.data[0] = float("nan")
    with pytest.raises(dyconvert.ModelError, match=r"layer1\.0\.conv1 isn't finite"):
        dyconvert.compress(dynamic)


def test_a_model_that_computes_something_else_is_refused(net, monkeypatch):
    dynamic = moved(net)
    monkeypatch.setitem(TOLERANCE, "int8", 1e-6)
    with pytest.raises(dyconvert.ModelError, match="computes something else"):
        dyconvert.compress(dynamic, "int8", images())
    assert dyconvert.compress(dynamic, "int8", images(), check=False).dyconvert_compression.difference is None


def test_the_command_line(cli, tmp_path):
    made = cli("digits-resnet8", "--g", 3, "--compress", "int8", "-o", tmp_path / "a")
    assert made.code == 0
    assert "compressed to int8, largest difference" in made.said
    seen = cli("inspect", tmp_path / "a")
    assert "compressed to int8" in seen.said
    assert json.loads(cli("inspect", tmp_path / "a", "--json").stdout)["compression"]["dtype"] == "int8"
    cli("digits-resnet8", "--g", 3, "-o", tmp_path / "b")
    done = cli("export", tmp_path / "b", "--to", "torch", "--compress", "bfloat16", "-o", tmp_path / "b.pt2")
    assert done.code == 0
    assert "compressed to bfloat16" in done.said
    refused = cli("digits-resnet8", "--compress", "int4", "-o", tmp_path / "c")
    assert refused.code == 2
    assert "int8 or bfloat16" in refused.said


def test_predictors_that_int8_would_shift_are_kept_in_bfloat16(net, tmp_path, monkeypatch):
    monkeypatch.setattr("dyconvert.surgery.compress._CLOSE", 1e-6)
    small = dyconvert.compress(moved(net), "int8", images())
    assert "(the predictors to bfloat16)" in str(small.dyconvert_compression)
    assert small.layer1[0].conv1.weight.dtype == torch.int8
    layers = [m for m in small.modules() if isinstance(m, CompressedLinear)]
    assert {m.weight.dtype for m in layers} == {torch.bfloat16}
    dyconvert.save(small, tmp_path / "small")
    loaded = dyconvert.load(tmp_path / "small", seeded(ResidualNet))
    assert dyconvert.verify(small, loaded, images()).absolute == 0
