"""Times single dynamic convs beside static ones and other implementations."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dyconvert.analysis.timing import Timing, bandwidth, in_turns, peak_memory
from dyconvert.errors import ModelError
from dyconvert.limits import INPUT_VALUES
from dyconvert.methods import Method, get_method
from dyconvert.nn import native, native_library
from dyconvert.nn.dispatch import dynamic_conv, force
from dyconvert.nn.mixture import Mixing, Mixture, sizes_for
from dyconvert.nn.operands import Geometry, Operands


class Layer(NamedTuple):
    """A 2-d conv and the height and width of the square map it reads, padded to keep its size (at stride 1)."""

    c_in: int
    c_out: int
    kernel: int
    size: int
    stride: int = 1
    groups: int = 1

    @property
    def label(self) -> str:
        kind = "dw " if self.groups == self.c_in > 1 else f"groups {self.groups} " if self.groups > 1 else ""
        channels = f"{self.c_in}" if self.c_in == self.c_out else f"{self.c_in}-{self.c_out}"
        stride = f"/{self.stride}" if self.stride > 1 else ""
        return f"{kind}{self.kernel}x{self.kernel}{stride} {channels} @{self.size}"


# Convs of ResNet50 and MobileNetV2, ResNet18, and MobileNetV3-Large, at 224 pixels.
LAYERS = (
    Layer(64, 64, 3, 56),
    Layer(64, 256, 1, 56),
    Layer(256, 256, 3, 14),
    Layer(1024, 256, 1, 14),
    Layer(512, 512, 3, 7),
    Layer(2048, 512, 1, 7),
    Layer(576, 576, 3, 14, groups=576),
    Layer(96, 576, 1, 14),
    Layer(64, 128, 1, 56, stride=2),
    Layer(64, 128, 3, 56, stride=2),
    Layer(128, 128, 3, 28),
    Layer(256, 512, 3, 14, stride=2),
    Layer(40, 120, 1, 28),
    Layer(120, 120, 5, 28, groups=120),
    Layer(112, 672, 1, 14),
    Layer(672, 160, 1, 7),
    Layer(960, 960, 5, 7, groups=960),
)


class LayerResult(NamedTuple):
    """The result of :func:`bench_layer`. Times in seconds, memory in bytes; None if it wasn't run.

    Attributes:
        limit: the static conv's time and one read of the bank (forward and backward read it twice, and write it
            once).
        kernel: the compiled kernel that computed the output; None: another strategy did.
    """

    layer: str
    batch: int
    method: str
    training: bool
    static: Timing
    dynamic: Timing
    timm: Timing | None
    features: Timing | None
    limit: float
    memory: dict[str, int]
    kernel: str | None


def compiled_kernel(layer: Layer, batch: int, method: Method) -> str | None:
    """Which of the compiled kernels computes the layer's output; None: another strategy does."""
    channels = layer.c_in // layer.groups
    x = torch.empty(batch, layer.c_in, layer.size, layer.size)
    weight = torch.empty(method.g * layer.c_out, channels, layer.kernel, layer.kernel)
    mixing = Mixing.of(mixture_of(layer, batch, method, torch.empty), weight.shape, layer.groups, bias=False)
    geometry = Geometry((layer.stride,) * 2, (layer.kernel // 2,) * 2, (1, 1), layer.groups)
    call = native.prepare(Operands(x, weight, None, mixing, geometry))
    return None if call is None else call.kernel(native_library.Task.OUTPUT, torch.float32).name.lower()


def bench_layer(
    layer: Layer,
    batch: int,
    method: str | Method = "condconv",
    g: int = 6,
    *,
    training: bool = False,
    repeats: int = 15,
    read: float | None = None,
    features: bool = True,
    memory: bool = False,
    cpu: bool = False,
    device: torch.device | None = None,
) -> LayerResult:
    """One dynamic conv against the static one, timm's `CondConv2d` and mixing feature maps, in turns.

    Args:
        g: the same for all of them, so that they do the same work.
        training: time a forward and a backward.
        read: bytes a second that memory can be read at; None: it is measured.
        features: time mixing feature maps, which takes g times the static conv's time.
        memory: measure the peak memory of each as well, in a process for each; on a CPU only.
        cpu: count CPU time, see :func:`~dyconvert.analysis.timing.in_turns`.
        device: where they compute; None is the CPU.
    """
    method = get_method(method, g=g)
    _check_sizes(layer, batch, method.g)
    read = read or bandwidth(cpu, device)
    calls = layer_calls(layer, batch, method, training, device=device or "cpu")
    if not features:
        del calls["features"]
    timings = in_turns(calls, repeats, cpu=cpu, device=device)
    bank = g * layer.c_out * layer.c_in // layer.groups * layer.kernel**2 * 4
    peaks = {}
    if memory:
        for name in calls:
            code = (
                "from dyconvert.analysis.bench_layer import Layer, layer_calls\n"
                "from dyconvert.methods import Method\n"
                f"method = Method.model_validate_json({method.model_dump_json()!r})\n"
                f"run = layer_calls({layer!r}, {batch}, method, {training}, only={name!r})[{name!r}]\n"
            )
            peaks[name] = peak_memory(code, torch.get_num_threads())
    return LayerResult(
        layer.label,
        batch,
        method.name,
        training,
        timings["static"],
        timings["dynamic"],
        timings.get("timm"),
        timings.get("features"),
        timings["static"].median + bank * (3 if training else 1) / read,
        peaks,
        compiled_kernel(layer, batch, method) if device is None or device.type == "cpu" else None,
    )


def _check_sizes(layer: Layer, batch: int, g: int) -> None:
    """Refuse tensors that would fill the memory.

    Raises:
        ModelError: see above.
    """
    pixels = batch * layer.size**2
    bank = g * layer.c_out * layer.c_in // layer.groups * layer.kernel**2
    for what, count in (("input", layer.c_in * pixels), ("output", layer.c_out * pixels), ("experts", bank)):
        if count > INPUT_VALUES:
            raise ModelError(
                f"{layer.label} with {batch} images has {count:,} values in its {what}, and at most {INPUT_VALUES:,} "
                "are timed. Give fewer images, channels or experts."
            )


def mixture_of(layer: Layer, batch: int, method: Method, make: Callable[..., Tensor]) -> Mixture:
    """A mixture as `method` predicts it for the layer; `make(*size)` makes its tensors."""
    sizes = sizes_for(method, layer.c_in, layer.c_out, (layer.kernel,) * 2, layer.groups)
    factors = [make(batch, size) if size else None for size in (sizes.outputs, sizes.inputs, sizes.positions)]
    return Mixture(make(batch, sizes.g, sizes.per), *factors)


def layer_calls(
    layer: Layer,
    batch: int,
    method: Method,
    training: bool,
    only: str | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> dict[str, Callable[[], Tensor]]:
    """The functions that :func:`bench_layer` times: without arguments, computing the same from the same numbers."""
    generator = torch.Generator().manual_seed(0)
    form = torch.channels_last if channels_last else torch.contiguous_format

    def placed(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype, memory_format=form if tensor.dim() == 4 else torch.preserve_format)

    def random(*size: int) -> Tensor:
        return placed(torch.rand(size, generator=generator).sub_(0.5)).requires_grad_(training)

    x = random(batch, layer.c_in, layer.size, layer.size)
    weight = random(method.g * layer.c_out, layer.c_in // layer.groups, layer.kernel, layer.kernel)
    mixture = mixture_of(layer, batch, method, random)
    padding = layer.kernel // 2
    static = nn.Conv2d(
        layer.c_in, layer.c_out, layer.kernel, layer.stride, padding, groups=layer.groups, bias=False
    ).requires_grad_(training)
    static.to(device, dtype).to(memory_format=form)
    with torch.no_grad():
        grad = placed(torch.rand(static(x).shape, generator=generator))

    def dynamic() -> Tensor:
        pair = (layer.stride,) * 2, (padding,) * 2, (1, 1), layer.groups
        return dynamic_conv(x, weight, None, mixture, *pair)

    def features() -> Tensor:
        with force("features"):
            return dynamic()

    forwards = {"static": lambda: static(x), "dynamic": dynamic, "features": features}
    alike = mixture.coefficients() is mixture.experts and mixture.experts.shape[2] == 1  # as CondConv's
    if alike and (timm := _timm_conv(layer, weight, method.g)) is not None:
        eta = mixture.experts.detach().squeeze(2).requires_grad_(training)
        forwards["timm"] = lambda: timm(x, eta)
    if only is not None:
        forwards = {only: forwards[only]}

    def step(forward: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            for leaf in (x, weight, *mixture.axes().values(), static.weight):
                leaf.grad = None
            out = forward()
            out.backward(grad)
            return out

        def infer() -> Tensor:
            with torch.inference_mode():
                return forward()

        return run if training else infer

    return {name: step(forward) for name, forward in forwards.items()}


def _timm_conv(layer: Layer, weight: Tensor, g: int) -> nn.Module | None:
    try:
        import timm.layers as layers
    except ImportError:
        return None
    conv = layers.CondConv2d(  # type: ignore[attr-defined]
        layer.c_in, layer.c_out, layer.kernel, layer.stride, layer.kernel // 2, groups=layer.groups, num_experts=g
    )
    conv.weight = nn.Parameter(weight.detach().reshape(g, -1), requires_grad=weight.requires_grad)
    return conv
