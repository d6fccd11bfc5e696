"""Export: what the runtimes compute, at sizes that weren't exported, and what becomes of failures."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from nets import IMAGE, FlatNet, ResidualNet, seeded
from torch import Tensor, nn
from varied import coefficient_spread, randomised, with_statistics

import dyconvert
from dyconvert import models
from dyconvert.exporting.export import export_onnx, export_torch
from dyconvert.surgery.fuse import fuse

onnx = pytest.importorskip("onnx", reason="needs dyconvert[onnx]")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs dyconvert[onnx]")
pytest.importorskip("onnxscript", reason="needs dyconvert[onnx]")

METHODS = tuple(dyconvert.METHODS)
# Where one method shows it, the others are checked in the sweep: an export takes seconds.
DYNET_FIRST = ("dynet", *(pytest.param(m, marks=pytest.mark.sweep) for m in METHODS[1:]))

# float32 sums in another order; what issue trackers and this project's users ask for.
AGREES = 1e-4
# float16 rounds by 5e-4; the nets here are shallow.
AGREES_FP16 = 1e-2


def images(batch: int, dims: int = 2, seed: int = 0, size: tuple[int, ...] | None = None) -> Tensor:
    shape = (IMAGE[dims][0], *size) if size else IMAGE[dims]
    # Their levels differ, so that the coefficients do.
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, *shape, generator=generator) * torch.linspace(0.5, 3, batch).view(-1, *[1] * len(shape))


def session(file: Path) -> "onnxruntime.InferenceSession":
    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def apart(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Largest difference from torch, relative to the largest output."""
    with torch.no_grad():
        expected = model.eval()(x)
    actual = run(x)
    assert actual.shape == expected.shape
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def onnx_runner(file: Path) -> Callable[[Tensor], Tensor]:
    loaded = session(file)
    return lambda x: torch.from_numpy(loaded.run(None, {"input": x.numpy()})[0])


class _Kinds(nn.Module):
    """Every way a conv can walk: stride, dilation, groups, depthwise, 'same', even kernels, reflection, bias."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.strided = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.dilated = nn.Conv2d(8, 8, 3, padding="same", dilation=2, bias=False)
        self.grouped = nn.Conv2d(8, 12, 3, padding=(1, 0), groups=2)
        self.depthwise = nn.Conv2d(12, 24, 5, stride=(1, 2), padding=2, groups=12)
        self.even = nn.Conv2d(24, 8, (2, 4), padding="same")
        self.reflect = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.pointwise = nn.Conv2d(8, 6, 1, stride=2)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        for name in ("stem", "strided", "dilated", "grouped", "depthwise", "even", "reflect", "pointwise"):
            x = getattr(self, name)(x).relu()
        return self.head(x.flatten(2).mean(2))


@pytest.mark.parametrize(
    ("method", "batch"), [*((method, None) for method in METHODS), ("dynet", 1), ("condconv", 3), ("odconv", 3)]
)
def test_every_kind_of_conv(method, batch, tmp_path):
    model = randomised(dyconvert.convert(seeded(_Kinds), method=method, scope="layer"))
    done = export_onnx(model, tmp_path / "m.onnx", images(batch or 2), dynamic_batch=batch is None)
    run = onnx_runner(done.file)
    for n in (1, 3, 8) if batch is None else (batch,):
        assert apart(model, run, images(n, seed=n)) < AGREES
    assert done.difference < AGREES
    assert done.bytes == done.file.stat().st_size
    assert done.opset == 20


@pytest.mark.parametrize(("method", "fused"), [("dynet", False), *((method, True) for method in METHODS)])
def test_any_batch_and_any_size(method, fused, tmp_path):
    model = with_statistics(randomised(dyconvert.convert(seeded(ResidualNet), method=method)))
    if fused:
        model = fuse(model)
    done = export_onnx(model, tmp_path / "m.onnx", images(1), dynamic_size=True)
    run = onnx_runner(done.file)
    for n, size in ((1, (16, 16)), (3, (24, 40)), (8, (17, 9))):
        assert apart(model, run, images(n, seed=n, size=size)) < AGREES
    shape = session(done.file).get_inputs()[0].shape
    assert shape == ["batch", 3, "height", "width"]
    # It mixes: the same images in another batch, but with others' coefficients, would be far off.
    x = images(4)
    assert apart(model, lambda x: run(x.flip(0)), x) > 100 * AGREES


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("dynamic", [True, False])
def test_other_dimensions(dims, dynamic, tmp_path):
    model = randomised(dyconvert.convert(seeded(FlatNet, dims=dims)))
    done = export_onnx(model, tmp_path / "m.onnx", images(2, dims), dynamic_batch=dynamic)
    for n in (1, 5) if dynamic else (2,):
        assert apart(model, onnx_runner(done.file), images(n, dims)) < AGREES


def test_timm_padding(tmp_path):
    layers = pytest.importorskip("timm.layers")
    net = nn.Sequential(nn.Conv2d(3, 8, 3), layers.Conv2dSame(8, 8, 3, stride=2), nn.Flatten(2))
    model = randomised(dyconvert.convert(net.eval()))
    export_onnx(model, tmp_path / "m.onnx", images(2))
    assert apart(model, onnx_runner(tmp_path / "m.onnx"), images(3)) < AGREES


def test_transposed_convs_need_a_fixed_batch(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 4, 3, stride=2, output_padding=1), nn.Flatten(2))
    model = randomised(dyconvert.convert(net.eval()))
    with pytest.raises(dyconvert.DyconvertError, match=r"fixed batch only.*dynamic_batch=False"):
        export_onnx(model, tmp_path / "m.onnx", images(2))
    export_onnx(model, tmp_path / "m.onnx", images(2), dynamic_batch=False)
    assert apart(model, onnx_runner(tmp_path / "m.onnx"), images(2)) < AGREES


# ---- What the graph costs ----


def onnx_macs(file: Path) -> int:
    """Multiply-adds of the Conv, MatMul and Gemm nodes, by onnx's own shape inference."""
    model = onnx.shape_inference.infer_shapes(onnx.load(str(file)), strict_mode=True, data_prop=True)
    graph = model.graph
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        shapes[value.name] = [d.dim_value for d in value.type.tensor_type.shape.dim]
    total = 0
    for node in graph.node:
        if node.op_type in ("Einsum", "Loop", "Scan", "If"):
            raise AssertionError(f"{node.op_type} isn't counted")
        if node.op_type not in ("Conv", "MatMul", "Gemm"):
            continue
        out, weight = shapes[node.output[0]], shapes[node.input[1]]
        assert all(out)
        assert all(weight), f"{node.name} has an unknown shape"
        if node.op_type == "Conv":
            reduced = np.prod(weight[1:])
        elif node.op_type == "MatMul":
            reduced = weight[-2]
        else:
            transposed = any(a.name == "transB" and a.i for a in node.attribute)
            reduced = weight[1] if transposed else weight[0]
        total += int(np.prod(out) * reduced)
    return total


def mixing_macs(model: nn.Module) -> int:
    """The predictors' linears, and every expert times its coefficient."""
    total = 0
    for module in model.modules():
        if isinstance(module, dyconvert.CoefficientPredictor):
            total += sum(linear.weight.numel() for linear in module.modules() if isinstance(linear, nn.Linear))
        if isinstance(module, dyconvert.DynamicConv):
            total += module.weight.numel() + (0 if module.bias is None else module.bias.numel())
    return total


@pytest.mark.parametrize("method", DYNET_FIRST)
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("mobilenet_v3_small", 128),
        pytest.param("resnet50", 224, marks=pytest.mark.sweep),
        pytest.param("mobilenet_v2", 224, marks=pytest.mark.sweep),
        pytest.param("efficientnet_b0", 224, marks=pytest.mark.sweep),
    ],
)
def test_one_image_costs_one_conv_and_the_mixing(name, size, method, tmp_path):
    from dyconvert.analysis.flops import macs

    static = seeded(torchvision.models.get_model, name, weights=None)
    model = randomised(dyconvert.convert(static, method=method), std=0.2)
    x = images(1, size=(size, size))
    export_onnx(fuse(model), tmp_path / "m.onnx", x, dynamic_batch=False)
    graph, one, mixing = onnx_macs(tmp_path / "m.onnx"), macs(static, x), mixing_macs(model)
    assert graph <= 1.1 * one + mixing
    assert graph >= one + 0.9 * mixing  # else something wasn't counted


# ---- Other formats ----


@pytest.mark.parametrize("method", DYNET_FIRST)
def test_float16(method, tmp_path):
    model = with_statistics(randomised(dyconvert.convert(seeded(ResidualNet), method=method)))
    full = export_onnx(model, tmp_path / "full.onnx", images(2))
    half = export_onnx(model, tmp_path / "half.onnx", images(2), fp16=True)
    assert session(half.file).get_inputs()[0].type == "tensor(float)"
    assert apart(model, onnx_runner(half.file), images(3)) < AGREES_FP16
    assert str(tmp_path).encode() not in half.file.read_bytes()
    assert b"nets.py" not in half.file.read_bytes()  # no stack traces
    weights = {t.data_type for t in onnx.load(str(half.file)).graph.initializer if np.prod(t.dims) > 100}
    assert weights == {onnx.TensorProto.FLOAT16}
    assert half.bytes < 0.7 * full.bytes


@pytest.mark.parametrize("method", DYNET_FIRST)
def test_torch_export_is_saved_and_loaded(method, tmp_path):
    model = with_statistics(randomised(dyconvert.convert(seeded(ResidualNet), method=method)))
    done = export_torch(model, tmp_path / "m.pt2", images(2))
    program = torch.export.load(done.file).module()
    for n in (1, 3, 8):
        assert apart(model, program, images(n, seed=n)) < AGREES
    assert (done.opset, done.bytes) == (None, done.file.stat().st_size)


@pytest.mark.parametrize("dynamic", [True, False])
def test_openvino_reads_the_file_and_agrees(dynamic, tmp_path):
    openvino = pytest.importorskip("openvino", reason="openvino isn't installed; it isn't among the test extra")
    model = with_statistics(randomised(dyconvert.convert(seeded(ResidualNet))))
    export_onnx(model, tmp_path / "m.onnx", images(2), dynamic_batch=dynamic)
    core = openvino.Core()
    # OpenVINO computes in bfloat16 where the processor can; not to be compared at 1e-4.
    compiled = core.compile_model(
        core.read_model(tmp_path / "m.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": openvino.Type.f32}
    )
    for n in (1, 3, 8) if dynamic else (2,):
        assert apart(model, lambda x: torch.from_numpy(compiled(x.numpy())[0].copy()), images(n, seed=n)) < AGREES


@pytest.mark.sweep
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "name", ["resnet50", "mobilenet_v2", "mobilenet_v3_large", "shufflenet_v2_x1_0", "efficientnet_b0"]
)
def test_torchvision_models(name, method, tmp_path):
    x = images(16, size=(64, 64))
    static = with_statistics(seeded(torchvision.models.get_model, name, weights=None), x)
    model = randomised(dyconvert.convert(static, method=method))
    assert coefficient_spread(model, x) > 0.01  # else little would be mixed
    export_onnx(fuse(model), tmp_path / "m.onnx", x[:2], dynamic_size=True)
    run = onnx_runner(tmp_path / "m.onnx")
    # Images that the statistics are of: random weights let others grow from layer to layer, and rounding with them.
    for n in (1, 3, 8):
        assert apart(model, run, x[:n]) < AGREES
    assert apart(model, run, nn.functional.interpolate(x[:2], 96)) < AGREES


@pytest.mark.parametrize("method", DYNET_FIRST)
def test_cifar_resnet20_on_real_images(method, data_dir, tmp_path):
    from PIL import Image

    static, _ = models.create("cifar-resnet20", str(data_dir / "cifar10_resnets" / "resnet20-12fca82f.th"))
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        pixels = np.array(Image.open(data_dir / "cifar10" / "test.png").crop((0, 0, 32, 32 * 200)))
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    x = torch.from_numpy(pixels.reshape(-1, 32, 32, 3)).permute(0, 3, 1, 2).float().div(255)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = (x - mean) / std
    labels = torch.from_numpy(np.load(data_dir / "cifar10" / "test_labels.npy")[:200].astype(np.int64))
    # Little enough to leave it a classifier: what is compared is a network that works.
    model = randomised(dyconvert.convert(static, method=method), std=0.05)
    export_onnx(fuse(model), tmp_path / "m.onnx", x[:2], dynamic_size=method == "condconv")
    run = onnx_runner(tmp_path / "m.onnx")
    for n in (1, 3, 8, 200):
        assert apart(model, run, x[:n]) < AGREES
    assert (run(x).argmax(1) == labels).float().mean() > 0.85
    if method == "condconv":
        assert apart(model, run, torch.nn.functional.interpolate(x[:3], 48)) < AGREES


# ---- The command ----


def test_cli(cli, tmp_path):
    assert cli("convert", "digits-resnet8", "-o", "saved").code == 0
    done = cli("export", "saved")
    assert done.code == 0
    assert "wrote saved.onnx: 2." in done.said
    assert "any number of images, 1x8x8" in done.said
    model = dyconvert.load(tmp_path / "saved")
    digits = dyconvert.builtin.load_digits_test()[0][:5]
    assert apart(model, onnx_runner(tmp_path / "saved.onnx"), digits) < AGREES
    done = cli("export", "saved", "--batch", 1, "--fp16", "-o", "one.onnx", "--input-size", "16", "--json")
    assert (done.code, '"opset": 20' in done.stdout) == (0, True)
    assert session(tmp_path / "one.onnx").get_inputs()[0].shape == [1, 1, 16, 16]
    done = cli("export", "saved", "--to", "torch", "--batch", 1)
    assert (done.code, "saved.pt2" in done.said) == (0, True)
    for arguments, said in (
        (("saved",), "exists already"),
        (("saved", "--to", "torch", "--fp16", "--force"), "--fp16 is for ONNX"),
        (("nowhere",), "no model was saved there"),
    ):
        done = cli("export", *arguments)
        assert (done.code, said in done.said) == (2, True)
