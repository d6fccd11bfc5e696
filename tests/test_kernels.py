"""Every strategy computes the same dynamic conv, with the same gradients, wherever it runs."""

import gc
import resource

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

import dyconvert
from dyconvert.nn import tiles
from dyconvert.nn.dispatch import dynamic_conv, force
from dyconvert.nn.mixture import Mixing
from dyconvert.nn.operands import Geometry, Operands
from dyconvert.nn.running import STRATEGIES, tiled

# dims, c_in, c_out, kernel, stride, padding, dilation, groups, bias
CASES = {
    "3x3": (2, 4, 6, 3, 1, 1, 1, 1, False),
    "3x3 bias stride": (2, 4, 6, 3, 2, 1, 1, 1, True),
    "1x1": (2, 4, 6, 1, 1, 0, 1, 1, False),
    "1x1 stride bias": (2, 4, 6, 1, 2, 0, 1, 1, True),
    "1x1 padded": (2, 4, 6, 1, 1, 1, 1, 1, True),
    "dilated": (2, 4, 6, 3, 1, 2, 2, 1, False),
    "groups": (2, 4, 6, 3, 1, 1, 1, 2, True),
    "depthwise": (2, 4, 4, 5, 2, 2, 1, 4, False),
    "same": (2, 4, 6, 3, 1, "same", 2, 1, False),
    "same, even kernel": (2, 4, 6, 2, 1, "same", 1, 2, True),
    "valid": (2, 4, 6, 3, 2, "valid", 1, 1, False),
    "1d": (1, 4, 6, 3, 2, 1, 1, 1, True),
    "1d depthwise": (1, 4, 4, 3, 1, 1, 1, 4, False),
    "3d": (3, 2, 4, 3, 1, 1, 1, 1, False),
    "3d groups": (3, 4, 4, 2, 2, 0, 1, 2, True),
}
FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}


@pytest.fixture(autouse=True)
def one_thread():
    """The convs here are tiny: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def arguments(case, batch=3, per="layer", g=3, size=6, dtype=torch.float64, channels_last=False):
    dims, c_in, c_out, kernel, stride, padding, dilation, groups, bias = CASES[case]
    form = FORMATS[dims] if channels_last else torch.contiguous_format
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    x = random(batch, c_in, *[size] * dims).contiguous(memory_format=form)
    weight = random(g * c_out, c_in // groups, *[kernel] * dims).contiguous(memory_format=form)
    tensors = [x, weight, random(g * c_out) if bias else None, random(batch, g, c_out if per == "channel" else 1)]

    def each(value):
        return value if isinstance(value, str) else (value,) * dims

    return [t if t is None else t.requires_grad_() for t in tensors], (
        each(stride),
        each(padding),
        each(dilation),
        groups,
    )


def reference(tensors, geometry):
    """Image by image, expert by expert: the definition."""
    x, weight, bias, coefficients = tensors
    g = coefficients.shape[1]
    conv = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.dim()]
    outs = []
    for image, eta in zip(x, coefficients, strict=True):
        kernel = sum(
            expert * e.reshape(-1, *[1] * (x.dim() - 1)) for expert, e in zip(weight.chunk(g), eta, strict=True)
        )
        mixed = None if bias is None else sum(b * e for b, e in zip(bias.chunk(g), eta, strict=True))
        # Contiguous: torch 2.14 misreads the strides of one image with its channels last in grouped convs' backward.
        outs.append(conv(image.contiguous().unsqueeze(0), kernel.contiguous(), mixed, *geometry))
    return torch.cat(outs)


def compare(out, tensors, geometry, tolerance=1e-12):
    expected = reference(tensors, geometry)
    assert (out - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1)
    if not out.requires_grad:
        return
    wanted = [t for t in tensors if t is not None]
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=expected.dtype)
    got, right = (torch.autograd.grad(o, wanted, grad) for o in (out, expected))
    for ours, theirs in zip(got, right, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp(min=1)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even")
@pytest.mark.parametrize("per", ["layer", "channel"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("strategy", [*STRATEGIES, None])
def test_strategies_agree(strategy, case, per):
    for batch, channels_last in ((1, False), (2, False), (5, False), (1, True), (3, True)):
        if channels_last and CASES[case][0] == 1:
            continue
        tensors, geometry = arguments(case, batch, per, channels_last=channels_last)
        with force(strategy):
            compare(dynamic_conv(*tensors, *geometry), tensors, geometry)
            with torch.no_grad():
                compare(dynamic_conv(*tensors, *geometry), tensors, geometry)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even")
@pytest.mark.parametrize("per", ["layer", "channel"])
@pytest.mark.parametrize("case", CASES)
def test_small_tiles_agree(case, per):
    tensors, geometry = arguments(case, 5, per)
    *others, eta = tensors
    for tile in (tiles.Tile(2, 6), tiles.Tile(2, 4) if geometry[3] == 1 else tiles.Tile(1, 6)):
        operands = Operands(*others, Mixing(eta), Geometry(*geometry))
        compare(tiled(operands, tile), tensors, geometry)
        with torch.no_grad():
            compare(tiled(operands, tile), tensors, geometry)


@pytest.mark.parametrize("per", ["layer", "channel"])
@pytest.mark.parametrize(("c_in", "c_out", "kernel", "batch"), [(256, 130, 3, 20), (900, 300, 1, 12), (256, 128, 3, 1)])
def test_large_layers_agree(c_in, c_out, kernel, batch, per):
    """Large enough for tiles, long kernels and the fast ways to mix."""
    # A coefficient's gradient sums 300,000 products: where it happens to be near zero, float32 misses it by more.
    torch.manual_seed(0)
    g = 3
    x = torch.randn(batch, c_in, 4, 4, requires_grad=True)
    weight = (torch.randn(g * c_out, c_in, kernel, kernel) / 50).requires_grad_()
    eta = torch.rand(batch, g, c_out if per == "channel" else 1, requires_grad=True)
    geometry = (1, 1), (kernel // 2,) * 2, (1, 1), 1
    with force("tiled"):
        out = dynamic_conv(x, weight, None, eta, *geometry)
    compare(out, [x, weight, None, eta], geometry, tolerance=2e-5)  # float32
    with torch.inference_mode():
        compare(dynamic_conv(x, weight, None, eta, *geometry), [x, weight, None, eta], geometry, tolerance=2e-5)


@pytest.mark.parametrize("frozen", ["x", "weight", "coefficients"])
@pytest.mark.parametrize("case", ["3x3", "1x1 stride bias", "depthwise"])
def test_frozen_parts_get_no_gradient(case, frozen):
    tensors, geometry = arguments(case)
    tensors[{"x": 0, "weight": 1, "coefficients": 3}[frozen]].requires_grad_(False)
    with force("tiled"):
        dynamic_conv(*tensors, *geometry).sum().backward()
    others = [t for t in tensors if t is not None and t.requires_grad]
    got = [t.grad for t in others]
    for ours, theirs in zip(got, torch.autograd.grad(reference(tensors, geometry).sum(), others), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("per", ["layer", "channel"])
@pytest.mark.parametrize("case", ["3x3 bias stride", "1x1 stride bias", "depthwise", "1d"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_first_and_second_gradients(strategy, case, per):
    tensors, geometry = arguments(case, batch=2, per=per, g=2, size=4)
    wanted = [t for t in tensors if t is not None]

    def run(*inputs):
        given = iter(inputs)
        return dynamic_conv(*[next(given) if t is not None else None for t in tensors], *geometry)

    with force(strategy):
        assert torch.autograd.gradcheck(run, wanted, fast_mode=True)
        assert torch.autograd.gradgradcheck(run, wanted, fast_mode=True)


class Net(nn.Module):
    """A 3x3, a depthwise and a 1x1 conv with residual."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a = nn.Conv2d(8, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.c = nn.Conv2d(8, 12, 1, stride=2)

    def forward(self, x):
        x = self.stem(x)
        return self.c(self.b(self.a(x).relu()) + x)


@pytest.fixture(params=dyconvert.METHODS)
def net(request):
    torch.manual_seed(0)
    model = dyconvert.convert(Net().eval(), method=request.param, g=3)
    for parameter in model.parameters():  # coefficients that differ between the images
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def test_export_with_a_dynamic_batch(net):
    shapes = {"x": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(net, (torch.randn(2, 3, 10, 10),), dynamic_shapes=shapes).module()
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 10, 10)
        torch.testing.assert_close(exported(x), net(x), rtol=1e-4, atol=1e-5)


def test_exported_batch_of_one_mixes_and_convolves(net):
    graph = torch.export.export(net, (torch.randn(1, 3, 10, 10),)).run_decompositions().graph
    targets = [node.target for node in graph.nodes if node.op == "call_function"]
    convs = [node for node in graph.nodes if node.target is torch.ops.aten.convolution.default]
    assert len(convs) == 4
    assert convs[1].args[8] == 1  # groups
    assert not any("im2col" in str(target) or "stack" in str(target) for target in targets)


def test_compile_without_recompiling_for_another_batch(net):
    frames = CompileCounter()
    compiled = torch.compile(net, fullgraph=True, backend=frames)
    with torch.no_grad():
        for batch in (2, 3, 4, 5, 7):
            x = torch.randn(batch, 3, 10, 10)
            torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-5)
    assert frames.frame_count <= 2  # once, and once more when the batch is seen to change
    torch._dynamo.reset()


def test_symbolic_trace_sees_a_leaf(net):
    traced = torch.fx.symbolic_trace(net)
    assert sum(node.target is dynamic_conv for node in traced.graph.nodes) == 3
    x = torch.randn(2, 3, 10, 10)
    torch.testing.assert_close(traced(x), net(x))


@pytest.mark.parametrize("batch", [1, 3])
def test_autocast(net, batch):
    x = torch.randn(batch, 3, 10, 10)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x)
        out.float().square().mean().backward()
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), net(x), rtol=0.1, atol=0.1)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_inference_mode_functional_call_and_vmap_of_grad(net):
    x = torch.randn(3, 3, 10, 10)
    with torch.inference_mode():
        inferred = net(x)
    torch.testing.assert_close(inferred, net(x), rtol=1e-4, atol=1e-5)
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(net, parameters, (x,)).square().mean()

    grads = torch.func.grad(loss)(parameters, x)
    loss(dict(net.named_parameters()), x).backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_training_after_inference_mode(net):
    """What inference caches must be of use to autograd."""
    x = torch.randn(2, 3, 10, 10)
    with torch.inference_mode():
        net(x)
    net(x).sum().backward()


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize(("per", "batch"), [("layer", 1), ("layer", 4), ("channel", 1), ("channel", 4)])
@pytest.mark.parametrize("case", ["3x3", "1x1", "depthwise", "1d"])
def test_flop_counter(case, per, batch, device):
    tensors, geometry = arguments(case, batch, per, dtype=torch.float32)
    x, weight, _, eta = (t if t is None else t.detach().to(device) for t in tensors)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        out = dynamic_conv(x, weight, None, eta, *geometry)
    kernel = weight.numel() // 3
    assert counter.get_total_flops() == 2 * batch * (kernel * out.shape[2:].numel() + 3 * kernel)


def test_memory_does_not_grow_with_shapes():
    convs = [dyconvert.convert(Net().eval(), method=method, g=4) for method in ("dynet", "condconv")]

    def round_trip():
        for size in (8, 13):
            for batch in (1, 4):
                for net in convs:
                    net(torch.randn(batch, 3, size, size)).sum().backward()
                    with torch.inference_mode():
                        net(torch.randn(batch, 3, size, size))
        gc.collect()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    first = [round_trip(), round_trip()][-1]
    assert round_trip() - first < 20_000  # KiB


def test_a_strategy_that_does_not_exist():
    with pytest.raises(dyconvert.DyconvertError, match="no strategy 'fastest'"), force("fastest"):
        pass


def test_nothing_is_kept_of_the_kernels():
    """The graph holds the arguments, whatever the batch."""
    x = torch.randn(16, 64, 4, 4, requires_grad=True)
    weight = torch.randn(3 * 64, 64, 3, 3, requires_grad=True)
    eta = torch.rand(16, 3, 1, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        dynamic_conv(x, weight, None, eta, (1, 1), (1, 1), (1, 1), 1)
    assert sum(saved) == x.numel() + weight.numel() + eta.numel()
