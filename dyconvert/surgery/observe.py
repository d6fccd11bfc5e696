"""A trial run without data: what each module reads, on the meta device where the model allows it."""

import inspect
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from dyconvert.arguments import as_call
from dyconvert.copying import clear_hooks, in_eval_mode, on_meta, sharing_copy
from dyconvert.errors import ModelError, brief
from dyconvert.limits import INPUT_VALUES
from dyconvert.nn import DynamicConv
from dyconvert.randomness import kept_random_state
from dyconvert.torch_internals.messages import needs_values
from dyconvert.torch_internals.modules import ConvNd, forward_hooks, forward_pre_hooks, times_written
from dyconvert.torch_internals.trees import tree_flatten, tree_map_only

# Spatial sizes that models are commonly built for, by the number of spatial dimensions.
_COMMON_SIZES: dict[int, list[tuple[int, ...]]] = {
    1: [(224,), (1024,), (16000,)],
    2: [(s, s) for s in (224, 299, 256, 384, 512, 128, 64, 32, 28, 16, 8)],
    3: [(16, 112, 112), (16, 224, 224), (32, 224, 224), (8, 56, 56), (16, 32, 32)],
}

# What a bank answers as its static weight does, so whoever asks for it may go on asking.
HARMLESS = {"dtype", "device", "requires_grad", "is_cuda", "is_meta", "layout", "ndim", "dim", "is_leaf", "grad_fn"}
HARMLESS |= {"is_floating_point", "is_complex", "element_size", "is_sparse", "is_quantized", "names"}

_META = torch.device("meta")


@dataclass
class Call:
    """One call of a module: its arguments, on the meta device where it was observed, and the modules around it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    within: tuple[str, ...] = ()


@dataclass
class Observation:
    """What trial runs showed: one in eval mode, and one training step.

    Attributes:
        args, kwargs: the arguments that the model was called with, on the meta device.
        real: the run was one with values, for the model looks at them.
        values: the same arguments with the values of that run, where it was one with values.
        hooked: the model's own hooks took part in the run, for it doesn't run without them.
        calls: every call of every watched module in eval mode, by name, in the order of their first calls.
        training: the same of the training step, backward included; None: the model can't be trained on the example.
        reads: of each watched conv, the functions that were given its weight or bias outside of its own forward.
        outputs: shapes of what the model returned in eval mode.
        functions: the torch functions that were called in eval mode, as :class:`FunctionsCalled` has them.
        edits: the model's forward changes its own parameters.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    real: bool = False
    hooked: bool = False
    calls: dict[str, list[Call]] = field(default_factory=dict)
    training: dict[str, list[Call]] | None = None
    reads: dict[str, set[str]] = field(default_factory=dict)
    outputs: list[Any] = field(default_factory=list)
    functions: list[Any] = field(default_factory=list)
    edits: bool = False
    values: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    @property
    def example(self) -> Any:
        """The arguments in the form in which an example is given: a tuple, or a dict of keyword arguments."""
        return self.kwargs if self.kwargs and not self.args else self.args

    def placed(self, runner: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for another run of a copy that :func:`trial_copy` made."""
        return _placed(runner, self.values or (self.args, self.kwargs), self.real)

    @property
    def image_channels(self) -> int | None:
        """Channels of the model's first tensor input, which is `[N, C, *spatial]`."""
        values = (*self.args, *self.kwargs.values())
        tensors = [leaf for leaf in tree_flatten(values)[0] if isinstance(leaf, Tensor)]
        if not tensors or tensors[0].dim() < 3:
            return None
        # A detection model takes a list of images without a batch dimension.
        batched = any(tensor is tensors[0] for tensor in values)
        return tensors[0].shape[1 if batched else 0]


def observe(model: nn.Module, watched: set[str], example: Any = None, *, train: bool = False) -> Observation | None:
    """Run the model once, in eval mode, and record the calls of the modules named in `watched`.

    Args:
        model: left as it is; a copy runs.
        example: the input tensor, the tuple of arguments, or a dict of keyword arguments. None: common input sizes are
            tried.
        train: run one training step, too.

    Returns:
        None if no input was given and none of those tried fits.

    Raises:
        ModelError: the model can't be copied, or rejects the given example.
    """
    with kept_random_state():
        return _observe(model, watched, example, train)


def _observe(model: nn.Module, watched: set[str], example: Any, train: bool) -> Observation | None:
    given = [as_call(model, example)] if example is not None else None
    failure: Exception | None = None
    # Detection and optical flow look at values, which the meta device doesn't have: they get a real run. Some models'
    # own hooks keep what their decoders read: they run with their hooks.
    for real, hooked in ((False, False), (True, False), (False, True), (True, True)):
        if real and any(p.device.type == "meta" for p in model.parameters()):
            continue
        if hooked and not _has_hooks(model):
            break
        for args, kwargs in given or guesses(model):
            runner = trial_copy(model, real, hooked)
            try:
                observation = _record(runner, watched, args, kwargs, real, _owners(model, watched))
            except Exception as error:
                failure = error
                if not given and real is False and needs_values(error):
                    break
                continue
            observation.real, observation.hooked = real, hooked
            observation.values = (args, kwargs) if real else None
            if train:
                runner = trial_copy(model, real, hooked)
                versions = [times_written(p) for p in runner.parameters()]
                held = _owners(model, watched)
                observation.training = _training_step(runner, watched, args, kwargs, real, observation.reads, held)
                observation.edits |= versions != [times_written(p) for p in runner.parameters()]
            return observation
    if given:
        raise ModelError(
            f"{type(model).__name__} rejects the example input: {brief(failure)}. Pass an example that the model's "
            "forward takes: `example=...`."
        ) from failure
    return None


def trial_copy(model: nn.Module, real: bool, hooked: bool) -> nn.Module:
    """A copy for a trial run, in eval mode: on the meta device, or with the model's values where `real`."""
    copy = in_eval_mode(sharing_copy(model) if real else on_meta(model))
    if not hooked:
        clear_hooks(copy)
    for module in copy.modules():
        # Its output is shaped as its input, and on the meta device it takes most of the run's time.
        if not real and type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            module.forward = lambda x: x
    return copy


def _has_hooks(model: nn.Module) -> bool:
    return any(forward_hooks(m) or forward_pre_hooks(m) for m in model.modules())


class FunctionsCalled(TorchFunctionMode):
    """Keeps what torch functions are called, in order: their names, the shapes they are given, and numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Any] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.see(name_of(function), args, kwargs)
        return function(*args, **kwargs)

    def see(self, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        """One call."""
        self.functions.append((name, _form(args), tuple((key, _form(value)) for key, value in kwargs.items())))


def name_of(function: Any) -> str:
    """What a torch function is called; of a tensor's attribute its name, as `shape`."""
    name = getattr(function, "__name__", "")
    if name == "__get__":
        name = getattr(function.__self__, "__name__", name)
    return name or str(resolve_name(function))


def _form(value: Any) -> Any:
    """What can be compared with another run's: shapes, numbers and texts."""
    if isinstance(value, Tensor):
        return (*value.shape, value.dtype) if not value.is_nested else "nested"
    if isinstance(value, (list, tuple)):
        return tuple(map(_form, value))
    plain = isinstance(value, (bool, int, float, str, torch.dtype))
    return repr(value) if plain else type(value).__name__


class _WeightReads(FunctionsCalled):
    """Notes every function that is given a watched conv's parameter while that conv isn't being called."""

    def __init__(self, owners: Mapping[int, str], stack: "CallStack", reads: dict[str, set[str]]) -> None:
        super().__init__()
        self.owners = owners
        self.stack = stack
        self.reads = reads

    def see(self, name: str, args: Any, kwargs: dict[str, Any]) -> None:
        super().see(name, args, kwargs)
        for value in (*args, *kwargs.values()):
            for t in value if isinstance(value, (list, tuple)) else (value,):
                owner = self.owners.get(id(t)) if isinstance(t, Tensor) else None
                if owner is not None and owner not in self.stack.names() and name not in HARMLESS:
                    self.reads.setdefault(owner, set()).add(name)


class CallStack(threading.local):
    """The watched modules that are being called in this thread, outermost first."""

    def __init__(self) -> None:
        self._names: list[str] = []

    def names(self) -> list[str]:
        return self._names


@contextmanager
def recording(model: nn.Module, watched: set[str]) -> Iterator[tuple[dict[str, list[Call]], CallStack]]:
    """Within it, every call of a watched module is kept, by name, and the stack says which are being called."""
    calls: dict[str, list[Call]] = {}
    stack = CallStack()
    handles = []

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.setdefault(name, []).append(Call(meta(args), meta(kwargs), tuple(stack.names())))
            stack.names().append(name)

        return hook

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if stack.names():
            stack.names().pop()

    for name, module in model.named_modules():
        if name in watched:
            handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
            handles.append(module.register_forward_hook(after, always_call=True))
    try:
        yield calls, stack
    finally:
        for handle in handles:
            handle.remove()


def meta(values: Any) -> Any:
    """`values` with every tensor in them on the meta device."""
    return tree_map_only(Tensor, lambda t: t.detach().to(_META), values)


def _record(
    model: nn.Module,
    watched: set[str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    real: bool,
    held: dict[int, str],
) -> Observation:
    """One run in eval mode.

    Args:
        held: the parameters of the model that this is a copy of: closures, weak references and globals go on holding
            its convs, for a copy doesn't follow them.
    """
    observation = Observation(meta(args), meta(kwargs))
    versions = [times_written(p) for p in model.parameters()]
    args, kwargs = _placed(model, (args, kwargs), real)
    with (
        torch.no_grad(),
        recording(model, watched) as (observation.calls, stack),
        _WeightReads(_owners(model, watched) | held, stack, observation.reads) as seen,
    ):
        returned = model(*args, **kwargs)
    observation.outputs = shapes(returned)
    observation.functions = seen.functions
    observation.edits = versions != [times_written(p) for p in model.parameters()]
    return observation


def _training_step(
    model: nn.Module,
    watched: set[str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    real: bool,
    reads: dict[str, set[str]],
    held: dict[int, str],
) -> dict[str, list[Call]] | None:
    """The calls of one step in training mode, forward and backward; None if the model can't take it."""
    model.train()
    for parameter in model.parameters():
        # A part that is frozen now may be trained later; what is checkpointed runs again only for gradients.
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(True)
    args, kwargs = _placed(model, (args, kwargs), real)
    own: dict[str, set[str]] = {}
    with recording(model, watched) as (calls, stack):
        try:
            with torch.enable_grad(), _WeightReads(_owners(model, watched) | held, stack, own):
                returned = model(*args, **kwargs)
                tensors = [t for t in tree_flatten(returned)[0] if isinstance(t, Tensor) and t.requires_grad]
                if tensors:
                    total: Any = sum((t.abs() if t.is_complex() else t).float().sum() for t in tensors)
                    total.backward()
        except Exception:  # a model may need targets to train, or more images: then nothing is known
            return None
    for name, functions in own.items():
        reads.setdefault(name, set()).update(functions)
    return calls


def _owners(model: nn.Module, watched: set[str]) -> dict[int, str]:
    return {
        id(parameter): name
        for name, module in model.named_modules()
        if name in watched and isinstance(module, ConvNd)
        for parameter in module.parameters(recurse=False)
    }


def shapes(value: Any) -> list[Any]:
    """The shapes and types of what lies in a value: what two runs' outputs are compared by."""
    return [
        tuple(leaf.shape) if isinstance(leaf, Tensor) and not leaf.is_nested else type(leaf).__name__
        for leaf in tree_flatten(value)[0]
    ]


def _placed(model: nn.Module, values: Any, real: bool) -> Any:
    """Values on the device that a trial copy runs on; zeros in the place of tensors that have no values."""
    device = next((p.device for p in model.parameters()), torch.device("cpu")) if real else _META

    def place(t: Tensor) -> Tensor:
        if t.device.type == "meta" and device.type != "meta":
            return torch.zeros(t.shape, dtype=t.dtype, device=device)
        return t.detach().to(device, copy=True)  # a forward may write into it

    return tree_map_only(Tensor, place, values)


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
    return random_images(arguments, first.device, batch, seed)


Arguments = TypeVar("Arguments", tuple[Any, ...], dict[str, Any])


def random_images(arguments: Arguments, device: torch.device, batch: int, seed: int = 0) -> Arguments:
    """Arguments on the meta device, by position or by keyword, as random ones, with `batch` images in each that is a
    tensor by itself."""
    if isinstance(arguments, dict):
        return dict(zip(arguments, random_images(tuple(arguments.values()), device, batch, seed), strict=True))
    generator = torch.Generator("cpu").manual_seed(seed)

    def image(t: Tensor, alone: bool) -> Tensor:
        shape = (batch, *t.shape[1:]) if alone else t.shape
        if math.prod(shape) > INPUT_VALUES:
            raise ModelError(
                f"An input of {'x'.join(map(str, shape))} has more than {INPUT_VALUES:,} values. Take fewer images at "
                "a time, or smaller ones: `example=...`."
            )
        return torch.randn(shape, generator=generator, device="cpu").to(device, t.dtype)

    return tuple(
        image(value, True) if isinstance(value, Tensor) else tree_map_only(Tensor, lambda t: image(t, False), value)
        for value in arguments
    )


def _convs(model: nn.Module) -> Iterator[nn.Module]:
    # A converted model's first conv may be dynamic itself.
    return (m for m in model.modules() if isinstance(m, (ConvNd, DynamicConv)))


def guesses(model: nn.Module) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Calls, with inputs on the meta device, that a model with this first conv may take."""
    first = next(_convs(model), None)
    if first is None:
        return
    dims = len(first.kernel_size)
    # timm's models say what they take.
    config: Any = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    known = config.get("input_size") if isinstance(config, dict) else None
    shapes = [(first.in_channels, *size) for size in _COMMON_SIZES[dims]]
    if known is not None and len(known) == dims + 1:
        shapes.insert(0, tuple(known))
    required = [p for p in inspect.signature(model.forward).parameters.values() if p.default is p.empty]
    positional = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in required)
    keywords = [p.name for p in required if p.kind is p.KEYWORD_ONLY]
    for shape in shapes:
        image = torch.empty(1, *shape, device="meta", dtype=first.weight.dtype)
        yield (image,) * (positional if keywords else max(positional, 1)), dict.fromkeys(keywords, image)
    for shape in shapes[:2]:
        yield ([torch.empty(shape, device="meta", dtype=first.weight.dtype)],), {}
