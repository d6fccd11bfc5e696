"""Everything that a GPU can do differently: `pytest -m cuda`, part of `benchmarks/gpu.py`.

With `DYCONVERT_TEST_DEVICE=cpu` the same tests run on a CPU, Triton's kernels under its interpreter: so that the day a
GPU is there, no test fails on a typo.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from nets import ResidualNet, image, seeded
from test_kernels import CASES, arguments, reference
from test_triton import TOLERANCE, bfloat16_in_the_interpreter  # noqa: F401  (a fixture for every test here)
from torch import Tensor, nn

import dyconvert
from dyconvert.nn import choice
from dyconvert.nn.choice import measuring, using
from dyconvert.nn.dispatch import dynamic_conv, force
from dyconvert.nn.measured_choices import Choices
from dyconvert.nn.triton import engine

DEVICE = torch.device(os.environ.get("DYCONVERT_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even"),
    pytest.mark.filterwarnings("error:Strategy:RuntimeWarning"),
]
only_on_a_gpu = pytest.mark.skipif(not ON_GPU, reason="a CPU has no such thing")


@pytest.fixture(autouse=True)
def choices() -> Iterator[Choices]:
    """Nothing of the user's cache is read or written."""
    with using(Choices()) as choices:
        yield choices


@pytest.fixture
def exact() -> Iterator[None]:
    """float32 without TensorFloat-32, which rounds to ten bits."""
    with precision("ieee"):
        yield


@contextmanager
def precision(name: str) -> Iterator[None]:
    """What float32 is multiplied in."""
    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    before = conv.fp32_precision, matmul.fp32_precision
    conv.fp32_precision = matmul.fp32_precision = name
    try:
        yield
    finally:
        conv.fp32_precision, matmul.fp32_precision = before


def on_device(tensors: list[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    return [t if t is None else t.detach().to(DEVICE, dtype).requires_grad_() for t in tensors]


def distance(found: Tensor, right: Tensor) -> float:
    """The largest difference, over the largest number."""
    right = right.detach().double().cpu()
    return float((found.detach().double().cpu() - right).abs().max() / right.abs().max().clamp(min=1))


STRATEGIES = ["groups", "unfold", "recompute_groups", "recompute_unfold", "features", *engine.TILES]
TWO_DIMS = [case for case, settings in CASES.items() if settings[0] == 2]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_agree_with_float64(strategy: str, dtype: torch.dtype, exact: None) -> None:
    cases = TWO_DIMS
    if strategy in engine.TILES:  # each is compiled, which takes seconds, as does the interpreter
        turn = list(engine.TILES).index(strategy) * len(TOLERANCE) + list(TOLERANCE).index(dtype)
        cases = (TWO_DIMS * 4)[3 * turn : 3 * turn + (3 if ON_GPU else 1)]
    for number, case in enumerate(cases):
        per, last = ("layer", "channel")[number % 2], number % 3 == 0
        tensors, geometry = arguments(case, 2, per, channels_last=last)
        ours = on_device(tensors, dtype)
        rounded = [t if t is None else t.detach().cpu().double().requires_grad_() for t in ours]
        right = reference(rounded, geometry)
        with force(strategy):
            out = dynamic_conv(*ours, *geometry)
        assert out.dtype == dtype
        assert distance(out, right) <= TOLERANCE[dtype], case
        grad = torch.randn(right.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
        found = torch.autograd.grad(out, [t for t in ours if t is not None], grad.to(DEVICE))
        known = torch.autograd.grad(right, [t for t in rounded if t is not None], grad.double())
        for name, a, b in zip(["x", "bank", "bias or eta", "eta"], found, known, strict=False):
            assert distance(a, b) <= 2 * TOLERANCE[dtype], (case, name)


LARGE = [  # images, C_in, C_out, kernel, size, stride, groups
    (8, 64, 96, 3, 28, 1, 1),
    (8, 128, 64, 3, 15, 2, 1),
    (16, 256, 512, 1, 7, 1, 1),
    (8, 96, 96, 5, 28, 2, 96),
    (4, 64, 64, 3, 14, 1, 4),
]


@only_on_a_gpu
@pytest.mark.parametrize("conv", LARGE, ids=str)
@pytest.mark.parametrize("tile", engine.TILES)
def test_triton_on_layers_of_real_sizes(tile: str, conv: tuple[int, ...]) -> None:
    turn = list(engine.TILES).index(tile) + LARGE.index(conv)
    tf32, last = turn % 2 == 0, turn % 3 == 0
    images, c_in, c_out, kernel, size, stride, groups = conv
    form = torch.channels_last if last else torch.contiguous_format
    generator = torch.Generator().manual_seed(0)
    shapes = (images, c_in, size, size), (6 * c_out, c_in // groups, kernel, kernel), (images, 6, c_out if last else 1)
    x, weight, eta = (torch.randn(shape, generator=generator) for shape in shapes)
    weight /= (c_in // groups * kernel**2) ** 0.5
    ours = [t.to(DEVICE).requires_grad_() for t in (x.contiguous(memory_format=form), weight, eta)]
    geometry = (stride,) * 2, (kernel // 2,) * 2, (1, 1), groups
    rounded = [t.double().requires_grad_() for t in (x, weight, eta)]
    right = reference([rounded[0], rounded[1], None, rounded[2]], geometry)
    grad = torch.randn(right.shape, generator=generator)
    with force(tile), precision("tf32" if tf32 else "ieee"):
        out = dynamic_conv(ours[0], ours[1], None, ours[2], *geometry)
        found = torch.autograd.grad(out, ours, grad.to(DEVICE))
    known = torch.autograd.grad(right, rounded, grad.double())
    # TensorFloat-32 has ten bits, as float16; float32's sums here are of up to a few thousand terms.
    tolerance = 4e-3 if tf32 else 5e-5
    for a, b in zip((out, *found), (right, *known), strict=True):
        assert distance(a, b) <= tolerance


@pytest.mark.parametrize("training", [False, True])
def test_the_first_call_measures_and_the_next_process_reads(training: bool, tmp_path: Path) -> None:
    tensors, geometry = arguments("3x3", dtype=torch.float32)
    tensors = on_device(tensors, torch.float32)

    def call(choices: Choices) -> None:
        with using(choices), torch.set_grad_enabled(training):
            dynamic_conv(*tensors, *geometry)

    first = Choices(tmp_path, cpu=True)
    call(first)
    ((name, found),) = first.items().items()
    assert ("training" in name) is training
    if ON_GPU:
        assert set(found.seconds) >= {"recompute_groups", *engine.TILES}
    if DEVICE.type != "cpu":
        (file,) = tmp_path.rglob("*.json")
        assert torch.cuda.get_device_name().replace(" ", "_")[:6] in file.name
    following = Choices(tmp_path, cpu=True)
    with measuring("read-only"):
        call(following)
    assert following.items() == {name: found}


@only_on_a_gpu
def test_training_keeps_no_kernels() -> None:
    images, channels = 256, 256
    weight = torch.randn(6 * channels, channels, 3, 3, device=DEVICE, requires_grad=True)
    x = torch.randn(images, channels, 4, 4, device=DEVICE, requires_grad=True)
    eta = torch.rand(images, 6, 1, device=DEVICE, requires_grad=True)
    kernels = images * weight.nbytes // 6
    geometry = (1, 1), (1, 1), (1, 1), 1
    for mode in ("off", "on"):
        with measuring(mode):
            dynamic_conv(x, weight, None, eta, *geometry)  # measures
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            out = dynamic_conv(x, weight, None, eta, *geometry)
            assert torch.cuda.memory_allocated() - before < kernels / 10
            out.sum().backward()


def model(**options: object) -> nn.Module:
    """A converted network whose coefficients differ among images."""
    net = dyconvert.convert(seeded(ResidualNet), g=2, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "predictor" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return net.to(DEVICE)


@pytest.mark.parametrize("method", dyconvert.METHODS)
def test_what_a_gpu_computes_is_what_a_cpu_computes(method: str, exact: None) -> None:
    net = model(method=method).eval()
    x = image(3)
    with torch.no_grad():
        ours = net(x.to(DEVICE))
        assert distance(ours, net.cpu()(x)) < 1e-4


def test_verify(exact: None) -> None:
    static = seeded(ResidualNet).to(DEVICE)
    dynamic = dyconvert.convert(static)
    assert all(t.device.type == DEVICE.type for t in dynamic.state_dict().values())
    assert dyconvert.verify(static, dynamic, image().to(DEVICE)).relative < 1e-4


def losses(net: nn.Module, steps: int = 4, dtype: torch.dtype | None = None) -> list[float]:
    """Of steps of SGD, under autocast with a gradient scaler where `dtype`."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=dtype == torch.float16)
    x, y = image(8).to(DEVICE), torch.arange(8, device=DEVICE) % 5
    found = []
    for _ in range(steps):
        with torch.autocast(DEVICE.type, dtype, enabled=dtype is not None):
            loss = nn.functional.cross_entropy(net(x).float(), y)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
        scaler.step(optimizer)
        scaler.update()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_with_a_gradient_scaler(dtype: torch.dtype, last: bool, exact: None) -> None:
    form = torch.channels_last if last else torch.contiguous_format
    plain = losses(model().to(memory_format=form))
    mixed = losses(model().to(memory_format=form), dtype=dtype)
    assert plain[-1] < plain[0]
    assert mixed == pytest.approx(plain, rel=0.05)


def test_channels_last_is_kept(exact: None) -> None:
    net = model().eval()
    x = image(3).to(DEVICE)
    with torch.no_grad():
        right = net(x)
        features = nn.Sequential(net.stem, net.layer1).to(memory_format=torch.channels_last)
        out = features(x.contiguous(memory_format=torch.channels_last))
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert distance(net(x.contiguous(memory_format=torch.channels_last)), right) < 1e-4


@pytest.mark.parametrize("training", [False, True])
def test_inductor(training: bool, exact: None) -> None:
    net = model().train(training)
    x = image(3).to(DEVICE)
    with torch.set_grad_enabled(training):
        right = net(x)  # which measures
        before = [buffer.clone() for buffer in net.buffers()]
        compiled = torch.compile(net, fullgraph=True)
        out = compiled(x)
    assert distance(out, right) < 1e-3
    assert len(before) == len(list(net.buffers()))
    if training:
        net.zero_grad()
        out.square().sum().backward()
        ours = [p.grad.clone() for p in net.parameters()]
        net.zero_grad()
        net(x).square().sum().backward()
        for a, p in zip(ours, net.parameters(), strict=True):
            assert distance(a, p.grad) < 1e-2
    torch._dynamo.reset()


@only_on_a_gpu
def test_cuda_graphs_by_inductor(exact: None) -> None:
    net = model().eval()
    x = image(3).to(DEVICE)
    with torch.no_grad():
        right = net(x)
        compiled = torch.compile(net, mode="reduce-overhead")
        for _ in range(4):
            assert distance(compiled(x).clone(), right) < 1e-3
    torch._dynamo.reset()


@only_on_a_gpu
@pytest.mark.parametrize("mode", ["on", "off"])
def test_a_captured_graph_replays(mode: str, choices: Choices, exact: None) -> None:
    net = model().eval()
    x = image(3).to(DEVICE)
    with torch.no_grad(), measuring(mode):
        right = [net(x), net(2 * x)]
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            net(x)
        torch.cuda.current_stream().wait_stream(stream)
        count = len(choices)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = net(x)
        assert len(choices) == count
        graph.replay()
        assert distance(out, right[0]) < 1e-4
        x.mul_(2)
        graph.replay()
        assert distance(out, right[1]) < 1e-4


@pytest.fixture
def one_process() -> Iterator[None]:
    """A group of one process, over the backend that the device has."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dist.init_process_group("nccl" if ON_GPU else "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_ddp(one_process: None, exact: None) -> None:
    alone = losses(model(), 3)
    net = nn.parallel.DistributedDataParallel(model(), device_ids=[0] if ON_GPU else None)
    assert losses(net, 3) == pytest.approx(alone, rel=1e-3)


def test_fsdp(one_process: None, exact: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    alone = losses(model(), 3)
    net = model()
    mesh = init_device_mesh(DEVICE.type, (1,))
    for block in net.layer1:
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    assert losses(net, 3) == pytest.approx(alone, rel=1e-3)


def test_checkpoints_go_from_cpu_to_gpu_and_back(tmp_path: Path) -> None:
    there = model()
    dyconvert.save(there, tmp_path / "gpu")
    here = dyconvert.load(tmp_path / "gpu", model=seeded(ResidualNet))
    expected = {name: t.cpu() for name, t in there.state_dict().items()}
    for name, tensor in here.cpu().state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    dyconvert.save(here, tmp_path / "cpu")
    again = dyconvert.load(tmp_path / "cpu", model=seeded(ResidualNet)).to(DEVICE)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor.cpu(), expected[name]), name


def test_a_resumed_run_ends_bit_for_bit_as_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lightning")
    from finetune_nets import recipe

    from dyconvert.finetuning.training.module import FineTuner

    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    settings = {
        "train": {"epochs": 2, "ema": 0.9, "accelerator": "gpu" if ON_GPU else "cpu"},
        "output": {"checkpoint_steps": 2, "checkpoint_minutes": None},
    }

    def made(name: str) -> dyconvert.Recipe:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        output = settings["output"] | {"directory": str(folder / "run")}
        return recipe(folder, train=settings["train"], output=output)

    torch.use_deterministic_algorithms(True)
    try:
        dyconvert.finetune(made("whole"), progress=False, trust_code=True)
        original = FineTuner.on_train_batch_start

        def stop(self: FineTuner, *arguments: object) -> None:
            if self.global_step == 7:
                raise RuntimeError("pulled the plug")
            original(self, *arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FineTuner, "on_train_batch_start", stop)
            with pytest.raises(Exception, match="pulled the plug"):
                dyconvert.finetune(made("parts"), progress=False, trust_code=True)
        dyconvert.finetune(made("parts"), resume=True, progress=False, trust_code=True)
    finally:
        torch.use_deterministic_algorithms(False)
    whole, parts = (
        dyconvert.load(tmp_path / name / "run/last", trust_code=True).state_dict() for name in ("whole", "parts")
    )
    assert [name for name, tensor in whole.items() if not torch.equal(tensor, parts[name])] == []


@only_on_a_gpu
def test_memory_that_runs_out_in_the_middle_of_a_measurement() -> None:
    """Where there is room for the conv, but not for an unfolded input beside it."""
    x = torch.randn(64, 32, 56, 56, device=DEVICE)
    weight = torch.randn(6 * 32, 32, 3, 3, device=DEVICE)
    eta = torch.rand(64, 6, 1, device=DEVICE)
    geometry = (1, 1), (1, 1), (1, 1), 1
    with measuring("off"):
        right = dynamic_conv(x, weight, None, eta, *geometry)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    room = torch.cuda.memory_reserved() + 4 * x.nbytes
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        with pytest.warns(RuntimeWarning, match="memory"):
            out = dynamic_conv(x, weight, None, eta, *geometry)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert distance(out, right) < 1e-2
    (found,) = choice.current().items().values()
    assert "recompute_unfold" not in found.seconds
