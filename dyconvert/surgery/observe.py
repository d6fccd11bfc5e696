"""A trial run without data: what each module reads, on the meta device where the model allows it."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_flatten, tree_map_only

from dyconvert.arguments import as_arguments
from dyconvert.copying import clear_hooks, on_meta, skeleton
from dyconvert.errors import ModelError, brief
from dyconvert.nn import DynamicConv

# Spatial sizes that models are commonly built for, by the number of spatial dimensions.
_COMMON_SIZES = {
    1: [(224,), (1024,), (16000,)],
    2: [(s, s) for s in (224, 299, 256, 384, 512, 128, 64, 32, 28, 16, 8)],
    3: [(16, 112, 112), (16, 224, 224), (32, 224, 224), (8, 56, 56), (16, 32, 32)],
}


@dataclass
class Call:
    """One call of a module: its arguments, on the meta device, and the modules it was called within."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    within: tuple[str, ...]


@dataclass
class Observation:
    """What a trial run in eval mode showed.

    Attributes:
        example: the arguments that the model was called with, on the meta device.
        calls: every call of every watched module, by name.
        order: the watched modules' names, in the order of their first call.
    """

    example: tuple[Any, ...]
    calls: dict[str, list[Call]] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)

    @property
    def image_channels(self) -> int | None:
        """Channels of the model's first tensor input, which is `[N, C, *spatial]`."""
        tensors = [leaf for leaf in tree_flatten(self.example)[0] if isinstance(leaf, Tensor)]
        if not tensors or tensors[0].dim() < 3:
            return None
        # A detection model takes a list of images without a batch dimension.
        batched = any(tensor is tensors[0] for tensor in self.example)
        return tensors[0].shape[1 if batched else 0]


def observe(model: nn.Module, watched: set[str], example: Any = None) -> Observation | None:
    """Run the model once, in eval mode, and record the calls of the modules named in `watched`.

    Args:
        model: left as it is; a copy runs.
        example: the input tensor or the tuple of arguments. None: common input sizes are tried.

    Returns:
        None if no input was given and none of those tried fits.

    Raises:
        ModelError: the model can't be copied, or rejects the given example.
    """
    bare = on_meta(model).eval()
    clear_hooks(bare)
    for module in bare.modules():
        # Its output is shaped as its input, and on the meta device it takes most of the run's time.
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            module.forward = lambda x: x
    given = [as_arguments(example)] if example is not None else None
    failure: Exception | None = None
    # Detection and optical flow look at values, which the meta device doesn't have: they get a real run.
    for real in (False, True):
        if real and any(p.device.type == "meta" for p in model.parameters()):
            break
        runner = bare
        if real:
            runner = skeleton(model, Tensor.detach).eval()
            clear_hooks(runner)
        for arguments in given or guesses(model):
            try:
                return _record(runner, watched, arguments, real)
            except Exception as error:
                failure = error
                if not given and real is False and _is_about_values(error):
                    break
    if given:
        raise ModelError(
            f"{type(model).__name__} rejects the example input: {brief(failure)}. Pass an example that the model's "
            "forward takes: `example=...`."
        ) from failure
    return None


def _is_about_values(error: Exception) -> bool:
    return "meta" in str(error).lower() or isinstance(error, NotImplementedError)


def _record(model: nn.Module, watched: set[str], arguments: tuple[Any, ...], real: bool) -> Observation:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def meta(values: Any) -> Any:
        return tree_map_only(Tensor, lambda t: t.detach().to("meta"), values)

    observation = Observation(meta(arguments))
    stack: list[str] = []
    handles = []

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name not in observation.calls:
                observation.order.append(name)
            call = Call(meta(args), meta(kwargs), tuple(stack))
            observation.calls.setdefault(name, []).append(call)
            stack.append(name)

        return hook

    def after(module: nn.Module, args: Any, output: Any) -> None:
        stack.pop()

    for name, module in model.named_modules():
        if name in watched:
            handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
            handles.append(module.register_forward_hook(after, always_call=True))
    target = device if real else torch.device("meta")
    arguments = tree_map_only(Tensor, lambda t: _filled(t, target), arguments)
    try:
        with torch.no_grad():
            model(*arguments)
    finally:
        for handle in handles:
            handle.remove()
    return observation


def _filled(t: Tensor, device: torch.device) -> Tensor:
    if t.device.type == "meta" and device.type != "meta":
        return torch.zeros(t.shape, dtype=t.dtype, device=device)
    return t.detach().to(device)


def example_for(
    model: nn.Module, batch: int = 2, size: tuple[int, ...] | None = None, seed: int = 0
) -> tuple[Any, ...]:
    """Random images that the model takes, on its device: the arguments of its forward.

    Args:
        batch: images in a batch; a model that takes a list of images gets one.
        size: `(C, *spatial)`, or `(*spatial,)` alone. None: the first of the common sizes that the model takes.

    Raises:
        ModelError: it takes none of them, or not this size.
    """
    first = next(model.parameters())
    if size is not None:
        first_conv = next(_convs(model), None)
        if first_conv is not None and len(size) == len(first_conv.kernel_size):
            size = (first_conv.in_channels, *size)
        arguments = observe(model, set(), torch.empty(1, *size, device="meta", dtype=first.dtype)).example
    elif (observed := observe(model, set())) is not None:
        arguments = observed.example
    else:
        raise ModelError(
            f"{type(model).__name__} takes none of the common input sizes. Give an input of its size: `example=...`."
        )
    generator = torch.Generator().manual_seed(seed)

    def image(t: Tensor, alone: bool) -> Tensor:
        shape = (batch, *t.shape[1:]) if alone else t.shape
        return torch.randn(shape, generator=generator).to(first.device, t.dtype)

    return tuple(
        image(value, True) if isinstance(value, Tensor) else tree_map_only(Tensor, lambda t: image(t, False), value)
        for value in arguments
    )


def _convs(model: nn.Module) -> Iterator[nn.Module]:
    # A converted model's first conv may be dynamic itself.
    return (m for m in model.modules() if isinstance(m, (_ConvNd, DynamicConv)))


def guesses(model: nn.Module) -> Iterator[tuple[Any, ...]]:
    """Inputs, on the meta device, that a model with this first conv may take."""
    first = next(_convs(model), None)
    if first is None:
        return
    dims = len(first.kernel_size)
    # timm's models say what they take.
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    known = config.get("input_size") if isinstance(config, dict) else None
    shapes = [(first.in_channels, *size) for size in _COMMON_SIZES[dims]]
    if known is not None and len(known) == dims + 1:
        shapes.insert(0, tuple(known))
    parameters = inspect.signature(model.forward).parameters.values()
    required = [
        p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    for shape in shapes:
        image = torch.empty(1, *shape, device="meta", dtype=first.weight.dtype)
        yield (image,) * max(len(required), 1)
    for shape in shapes[:2]:
        yield ([torch.empty(shape, device="meta", dtype=first.weight.dtype)],)
