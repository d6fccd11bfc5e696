"""Each private API of torch that is used, once, with its reason."""

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _python_dispatch

F = TypeVar("F", bound=Callable[..., Any])

# Sees every operator that a model runs, in eager mode; torch documents it in a note, and has no public name for it.
DispatchMode = _python_dispatch.TorchDispatchMode


def without_modes() -> AbstractContextManager[Any]:
    """A context whose operators no :class:`DispatchMode` sees: for what hooks compute while a model is watched."""
    return _python_dispatch._disable_current_modes()


# What a GraphModule's copy makes anew.
_OF_GRAPH_MODULES = {"_graph", "_code", "_modules", "_parameters", "_buffers", "_tracer_cls", "_tracer_extras"}


def fill_graph_module(copy: GraphModule, attributes: dict[str, Any], modes: dict[str, bool]) -> None:
    """Give a GraphModule's deep copy what `deepcopy` leaves out: forward hooks, plain attributes, train/eval switches.

    Args:
        copy: the copy.
        attributes: the deep copy of the original's `__dict__`.
        modes: the original's train/eval switches, by name.
    """
    if type(copy).train is not nn.Module.train:
        copy.train(modes[""])  # torchvision's feature extractors change their graph with their mode
    for name, value in attributes.items():
        if name not in _OF_GRAPH_MODULES and (name not in vars(copy) or name == "training" or "hook" in name):
            vars(copy)[name] = value
    modules = dict(copy.named_modules())
    for name, training in modes.items():
        if name in modules:
            modules[name].training = training


def keep_when_copied(module: GraphModule) -> None:
    """Have all later deep copies of a GraphModule keep what :func:`fill_graph_module` keeps."""
    hooks = vars(module).setdefault("_deepcopy_hooks", [])
    if not any(isinstance(hook, _Filler) for hook in hooks):
        hooks.append(_Filler(vars(module), {}))


class _Filler:
    """A deepcopy hook: torch copies it along with the module, its attributes included, and calls it with the copy."""

    def __init__(self, attributes: dict[str, Any], modes: dict[str, bool]) -> None:
        self.attributes = attributes
        self.modes = modes

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Filler":
        return _Filler(memo.get(id(self.attributes), self.attributes), modes_of(self.attributes))

    def __call__(self, copy: GraphModule) -> None:
        fill_graph_module(copy, self.attributes, self.modes)
        self.attributes = vars(copy)


def modes_of(attributes: dict[str, Any]) -> dict[str, bool]:
    """The train/eval switches of a module with these attributes, and of all in it, by name."""
    modes = {"": attributes["training"]}
    for key, child in attributes["_modules"].items():
        if child is not None:
            modes |= {name: module.training for name, module in child.named_modules(prefix=key)}
    return modes


def gradients_of_images(
    grad: Tensor,
    x: Tensor,
    kernels: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    needs_x: bool,
    needs_kernels: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of one conv whose groups are the images, each with kernels of its own.

    torch's public `conv2d_input` and `conv2d_weight` compute one gradient each, in a pass of its own.

    Args:
        grad: `[N, C_out, *out]`
        x: `[N, C_in, *spatial]`
        kernels: `[N * C_out, C_in / groups, *kernel]`; only its shape matters where `needs_x` is false.

    Returns:
        Those of x and of the kernels, in their shapes; None where not needed.
    """
    grad_x, grad_kernels, _ = torch.ops.aten.convolution_backward(
        # Not `reshape`: of one image with its channels last it makes strides that convolution_backward misreads.
        grad.contiguous().view(1, -1, *grad.shape[2:]),
        x.contiguous().view(1, -1, *x.shape[2:]),
        kernels,
        None,
        stride,
        padding,
        dilation,
        False,
        [0] * (x.dim() - 2),
        groups * x.shape[0],
        [needs_x, needs_kernels, False],
    )
    return grad_x.view(x.shape) if needs_x else None, grad_kernels if needs_kernels else None


def hook_tables(module: nn.Module) -> list[dict[int, Any]]:
    """The tables that say how a module's forward hooks are called, by the hooks' numbers."""
    return [
        module._forward_hooks_with_kwargs,
        module._forward_hooks_always_called,
        module._forward_pre_hooks_with_kwargs,
    ]


def constant_result(function: F) -> F:
    """Mark a function whose result `torch.compile` may keep: what `torch.compiler.assume_constant_result` does.

    That one imports the compiler, which takes two to three seconds and which most processes never use.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions that multiply bfloat16 (AVX-512's or AMX), which torch's convs use.

    There is no public question for it.
    """
    return torch.cpu._is_avx512_bf16_supported()
