"""The Triton kernels under Triton's interpreter, on a CPU, against the definition in float64; and what takes their
place where they fail. That they run on a GPU, `test_cuda.py` says where there is one.
"""

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_kernels import reference
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dyconvert
from dyconvert.nn.choice import using
from dyconvert.nn.dispatch import dynamic_conv, force
from dyconvert.nn.measured_choices import Choices
from dyconvert.nn.mixture import Mixing
from dyconvert.nn.operands import Geometry, Needs, Operands
from dyconvert.nn.triton import engine, launch

pytest.importorskip("triton", reason="Triton comes with torch's Linux builds only")
pytestmark = [
    pytest.mark.skipif(not engine.interpreted(), reason="the interpreter is off where there is a GPU"),
    pytest.mark.filterwarnings("error:Strategy:RuntimeWarning"),  # a kernel that fails is replaced, with a warning
    pytest.mark.filterwarnings("ignore:Using padding='same' with even"),
]


@pytest.fixture(autouse=True)
def bfloat16_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.8's interpreter keeps bfloat16 as 16-bit integers, and multiplies matrices of these."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    original = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        def wide(handle: Any) -> Any:
            if handle.dtype.scalar != tl.bfloat16:
                return handle
            bits = handle.data.astype(np.uint32) << 16
            return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

        return original(self, wide(a), wide(b), *others)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


# Of the largest result. Kernels, and what is computed of them, are rounded to a half precision once each, and float32
# is added up in another order; the sums here are of a few hundred terms.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4 * 2**-10, torch.bfloat16: 4 * 2**-7}


def draw(rng: random.Random) -> tuple[list[Tensor | None], Geometry, Tensor]:
    """A conv of any kind that the kernels know, small: its arguments, its geometry and a shift."""
    kernel = rng.choice([(1, 1), (1, 1), (3, 3), (3, 3), (1, 4), (3, 2), (2, 1)])
    stride, padding, dilation = (
        tuple(rng.choice(values) for _ in range(2)) for values in ((1, 1, 2, 3), (0, 1, 2), (1, 1, 2))
    )
    if rng.random() < 0.4:  # as most convs are
        stride, padding, dilation = (1, 1), tuple(k // 2 for k in kernel), (1, 1)
    elif rng.random() < 0.2:
        stride, padding = (1, 1), rng.choice(["same", "valid"])
    groups, c_in, c_out = rng.choice(
        [(1, 3, 5), (1, 20, 33), (1, 70, 3), (2, 6, 10), (3, 3, 6), (7, 7, 7), (16, 16, 16)]
    )
    around = (0, 0) if isinstance(padding, str) else padding
    least = [max(d * (k - 1) + 1 - 2 * p, 1) for k, d, p in zip(kernel, dilation, around, strict=True)]
    size = [rng.randint(length, length + 7) for length in least]
    batch, g, per_channel = rng.choice([1, 2, 3]), rng.choice([1, 2, 3, 6]), rng.random() < 0.5
    dtype = rng.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16])
    generator = torch.Generator().manual_seed(rng.randrange(1000))

    def values(*shape: int, last: bool = False) -> Tensor:
        form = torch.channels_last if last else torch.contiguous_format
        return torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=form)

    x = values(batch, c_in, *size, last=rng.random() < 0.5)
    weight = values(g * c_out, c_in // groups, *kernel, last=rng.random() < 0.5)
    bias = values(g * c_out) if rng.random() < 0.3 else None
    eta = values(batch, g, c_out if per_channel else 1)
    return [x, weight, bias, eta], Geometry(stride, padding, dilation, groups), values(c_out)


def check(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    tensors, geometry, shift = draw(rng)
    # As a large GPU splits the images among programs, and as a small one leaves them to each.
    monkeypatch.setattr(launch, "_PROGRAMS", rng.choice([1, 512]))
    monkeypatch.setattr(launch, "_BYTES", rng.choice([0, 2**29]))  # kernels of one image at a time, or of all
    tile = rng.choice(list(engine.TILES))
    dtype = tensors[0].dtype
    with torch.inference_mode(), force(tile):
        inferred = dynamic_conv(*tensors, *geometry, shift)
    tensors = [t if t is None else t.requires_grad_() for t in tensors]
    with force(tile):
        out = dynamic_conv(*tensors, *geometry)
    exact = [t if t is None else t.detach().double().requires_grad_() for t in tensors]
    right = reference(exact, geometry)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    wanted = [t for t in tensors if t is not None]
    ours = torch.autograd.grad(out, wanted, grad)
    theirs = torch.autograd.grad(right, [t for t in exact if t is not None], grad.double())
    shifted = right + shift.double().view(-1, 1, 1)
    for found, known in zip((inferred, out, *ours), (shifted, right, *theirs), strict=True):
        assert found.dtype == dtype
        assert found.shape == known.shape
        error = (found.double() - known).abs().max()
        assert error <= TOLERANCE[dtype] * known.abs().max().clamp(min=1), (seed, tile, error)
    if tensors[0].is_contiguous(memory_format=torch.channels_last) and not tensors[0].is_contiguous():
        assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("seed", range(24))
def test_any_shape(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check(seed, monkeypatch)


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(24, 324))
def test_any_shape_of_many(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check(seed, monkeypatch)


def small(dtype: torch.dtype = torch.float32, g: int = 2, *, grad: bool = True, dims: int = 2) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, *[3] * dims), (g * 4, 4, *[1] * dims), (2, g, 1)
    x, weight, eta = (torch.randn(s, generator=generator).to(dtype).requires_grad_(grad) for s in shapes)
    return [x, weight, None, eta]


PAIR = (1, 1), (0, 0), (1, 1), 1


@pytest.mark.parametrize("frozen", [(0,), (1,), (3,), (1, 3)])
def test_what_needs_no_gradient_gets_none(frozen: tuple[int, ...]) -> None:
    tensors = small()
    for index in frozen:
        tensors[index].requires_grad_(False)
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    with force("triton_64"):
        ours = torch.autograd.grad(dynamic_conv(*tensors, *PAIR).sum(), wanted)
    theirs = torch.autograd.grad(reference(tensors, PAIR).sum(), wanted)
    torch.testing.assert_close(ours, theirs)


def test_gradients_are_differentiable_again() -> None:
    tensors = small(g=1)
    with force("triton_64"):
        (first,) = torch.autograd.grad(dynamic_conv(*tensors, *PAIR).square().sum(), tensors[0], create_graph=True)
        ours = torch.autograd.grad(first.sum(), tensors[1])
    (first,) = torch.autograd.grad(reference(tensors, PAIR).square().sum(), tensors[0], create_graph=True)
    torch.testing.assert_close(ours, torch.autograd.grad(first.sum(), tensors[1]))


class Sizes(TorchDispatchMode):
    """The bytes of the largest tensor that is made within it."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.most = max(self.most, out.nbytes)
        return out


@pytest.mark.parametrize("groups", [1, 16])
def test_gradients_of_bank_and_coefficients_need_no_kernel_per_image(groups: int) -> None:
    images, channels, g = 8, 16, 2
    x = torch.randn(images, channels, 1, 1)
    weight = torch.randn(g * channels, channels // groups, 3, 3)
    eta = torch.randn(images, g, 1)
    grad = torch.randn(images, channels, 1, 1)
    geometry = Geometry((1, 1), (1, 1), (1, 1), groups)
    kernels = images * weight.nbytes // g
    with Sizes() as sizes:
        operands = Operands(x, weight, None, Mixing(eta), geometry)
        launch._bank_and_coefficients(grad, operands, Needs(False, True, True, False))
    assert sizes.most < kernels / 2


@pytest.fixture
def choices() -> Iterator[Choices]:
    with using(Choices()) as choices:
        yield choices


class Broken:
    """Kernels that fail."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getattr__(self, name: str) -> Any:
        def fail(*args: Any, **options: Any) -> None:
            raise self.error

        class Kernel:
            def __getitem__(self, grid: Any) -> Any:
                return fail

        return Kernel()


class OutOfResources(Exception):
    """Triton's, by name."""


@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize(
    "error", [RuntimeError("Failed to find C compiler. Please specify via CC"), OutOfResources("shared")]
)
def test_where_triton_fails_plain_operations_take_its_place(
    error: Exception, when: str, choices: Choices, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = small()
    wanted = [t for t in tensors if t is not None]
    right = reference(tensors, PAIR)
    if when == "forward":
        monkeypatch.setattr(launch, "_kernels", lambda: Broken(error))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.filters", [])
        patch.setattr("warnings.showwarning", lambda message, *args, **options: said.append(str(message)))
        said: list[str] = []
        with force("triton_64"):
            for _ in range(2):
                out = dynamic_conv(*tensors, *PAIR)
                if when == "backward":
                    patch.setattr(launch, "_kernels", lambda: Broken(error))
                found = torch.autograd.grad(out.sum(), wanted)
                torch.testing.assert_close(out, right)
                torch.testing.assert_close(found, torch.autograd.grad(right.sum(), wanted, retain_graph=True))
    if isinstance(error, OutOfResources):  # the other tiles may fit, and nothing is wrong here
        assert [choices.failed(name) for name in engine.TILES] == [name == "triton_64" for name in engine.TILES]
        assert not said
    else:
        assert all(choices.failed(name) for name in engine.TILES)
        assert len(said) == 1
        assert "Failed to find C compiler" in said[0]


def test_out_of_memory_is_not_triton_s_failure(choices: Choices, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_kernels", lambda: Broken(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError), force("triton_64"):
        dynamic_conv(*small(), *PAIR)
    assert not any(choices.failed(name) for name in engine.TILES)


@pytest.mark.parametrize("broken", [False, True])
def test_triton_is_measured_beside_the_others(broken: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a GPU, for which the CPU stands in."""
    from dyconvert.nn import choosing

    monkeypatch.setattr(choosing, "_is_gpu", lambda x: True)
    if broken:
        monkeypatch.setattr(launch, "_kernels", lambda: Broken(RuntimeError("PTX version is too old")))
    tensors = small()
    with using(Choices(tmp_path)) as choices:
        if broken:
            with pytest.warns(RuntimeWarning, match="Strategy 'triton_64' to 'triton_fused' fails here.*PTX") as caught:
                out = dynamic_conv(*tensors, *PAIR)
            assert len(caught) == 1
        else:
            out = dynamic_conv(*tensors, *PAIR)
        again = dynamic_conv(*tensors, *PAIR)
    (found,) = choices.items().values()
    plain = {"recompute_groups", "recompute_unfold"}
    assert set(found.seconds) == (plain if broken else plain | set(engine.TILES))
    assert bool(list(tmp_path.rglob("*.json"))) is not broken
    for value in (out, again):
        torch.testing.assert_close(value, reference(tensors, PAIR))


@pytest.mark.parametrize(("pixels", "padding"), [(2, (0, 0)), (2, "same"), (8, (0, 0))])
def test_mixing_feature_maps_is_measured_where_they_are_smaller_than_kernels(
    pixels: int, padding: str | tuple[int, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from dyconvert.nn import choosing

    monkeypatch.setattr(choosing, "_is_gpu", lambda x: True)
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 16, pixels, pixels), (12, 16, 1, 1), (2, 3, 1)
    x, weight, eta = (torch.randn(s, generator=generator) for s in shapes)
    with using(Choices(tmp_path)) as choices, torch.no_grad():
        dynamic_conv(x, weight, None, eta, (1, 1), padding, (1, 1), 1)
    (found,) = choices.items().values()
    assert ("features" in found.seconds) == (pixels == 2)  # 3 maps of 4 pixels, and a kernel of 16 weights


UNKNOWN = {
    "float64": (lambda: small(torch.float64), PAIR, "dtype is torch.float64"),
    "3-d": (lambda: small(dims=3), ((1,) * 3, (0,) * 3, (1,) * 3, 1), "isn't 2-d"),
    "many experts": (lambda: small(g=17), PAIR, "more than 16 experts"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_a_conv_that_they_do_not_know_is_refused_with_the_reason(case: str) -> None:
    tensors, geometry, reason = UNKNOWN[case]
    with pytest.raises(dyconvert.DyconvertError, match=reason), force("triton_64"):
        dynamic_conv(*tensors(), *geometry)


def test_without_a_gpu_and_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    engine._absent.cache_clear()
    monkeypatch.setattr(engine, "interpreted", lambda: False)
    fake = SimpleNamespace(get_current_target=lambda: (_ for _ in ()).throw(RuntimeError("0 active drivers")))
    monkeypatch.setattr("triton.runtime.driver", SimpleNamespace(active=fake))
    try:
        with (
            pytest.raises(dyconvert.DyconvertError, match=r"finds no GPU \(RuntimeError: 0 active"),
            force("triton_64"),
        ):
            dynamic_conv(*small(), *PAIR)
        monkeypatch.setitem(sys.modules, "triton", None)
        engine._absent.cache_clear()
        with pytest.raises(dyconvert.DyconvertError, match="can't be imported"), force("triton_64"):
            dynamic_conv(*small(), *PAIR)
    finally:
        engine._absent.cache_clear()


def test_a_failing_strategy_is_remembered_for_the_process_only(choices: Choices) -> None:
    with pytest.warns(RuntimeWarning, match="Strategy 'a' and 'b' fails here"):
        choices.fail(["a", "b"], RuntimeError("no"))
    assert not Choices().failed("a")


def run_compiler(*arguments: str) -> None:
    script = Path(__file__).with_name("triton_compiled.py")
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('"tensor_cores": true') >= 2


def test_machine_code_for_a_gpu_that_is_not_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Triton's own compiler takes the kernels to the end, ptxas included; the interpreter would let more pass."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    run_compiler("--quick", "90")


@pytest.mark.sweep
def test_machine_code_for_all_kinds_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    run_compiler("75", "80", "89", "90", "100")
