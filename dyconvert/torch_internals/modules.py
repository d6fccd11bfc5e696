"""What torch's modules are made of: their base classes, their tables of parameters, children and hooks.

The tables have had these names since the first releases. The public iterators leave out entries that are None, and
names that share a tensor or a child, and can't be written to.
"""

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin

# The base classes of torch's convs, transposed convs, batch norms, and batch and instance norms. There is no public
# name for any; a list of the classes would miss those that torch adds. Moved, `import dyconvert` fails here.
ConvNd = _ConvNd
ConvTransposeNd = _ConvTransposeNd
BatchNorm = _BatchNorm
BatchOrInstanceNorm = _NormBase

# What a transposed conv's forward computes from `output_size`: a function of the conv, the input, `output_size`,
# stride, padding, kernel size, the number of spatial dimensions, and dilation. Another signature fails at every call.
output_padding = _ConvTransposeNd._output_padding

# The method by which `nn.Conv2d.forward` convolves, and a subclass may do it otherwise.
CONV_FORWARD = "_conv_forward"
# What a call of a module goes through before its forward.
CALL = "_call_impl"


def conv_forward(cls: type[nn.Module]) -> Any:
    """The function by which a class of convs convolves; torch's transposed convs have an empty one.

    Compared with torch's own: a subclass that has another isn't a plain conv. If torch renames it, a subclass that
    overrides it is taken for a plain conv.
    """
    return getattr(cls, CONV_FORWARD, None)


def parameter_table(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """A module's own parameters, by name, those that are None included; writing to it registers them."""
    return module._parameters


def buffer_table(module: nn.Module) -> dict[str, Tensor | None]:
    """A module's own buffers, by name, those that are None included; writing to it registers them."""
    return module._buffers


def child_table(module: nn.Module) -> dict[str, nn.Module | None]:
    """A module's children under every name that they have; a Sequential's numbers are names here, for no attribute."""
    return module._modules


def tensor_tables(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """:func:`parameter_table` and :func:`buffer_table`."""
    return module._parameters, module._buffers


def forward_hooks(module: nn.Module) -> dict[int, Any]:
    """The hooks that run after a module's forward, by number. Torch has no way to ask for them."""
    return module._forward_hooks


def forward_pre_hooks(module: nn.Module) -> dict[int, Any]:
    """The hooks that run before a module's forward, by number. Torch has no way to ask for them."""
    return module._forward_pre_hooks


def remove_hook(module: nn.Module, number: int) -> None:
    """Take a forward hook off a module, and out of the tables that say how it is called.

    Its handle, which could remove it, is the user's. A new table keeps a number of no hook, which does nothing.
    """
    for table in (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._forward_hooks_with_kwargs,
        module._forward_hooks_always_called,
        module._forward_pre_hooks_with_kwargs,
    ):
        cast(dict[int, Any], table).pop(number, None)


def gradient_hooks(tensor: Tensor) -> list[Any]:
    """The hooks on a tensor's gradient, registered by `register_hook`. Torch has no way to ask for them."""
    return list((tensor._backward_hooks or {}).values())


def accumulation_hooks(tensor: Tensor) -> list[Any]:
    """The hooks registered by `register_post_accumulate_grad_hook`. Torch has no way to ask for them."""
    return list((tensor._post_accumulate_grad_hooks or {}).values())


def times_written(tensor: Tensor) -> int:
    """How often a tensor was written to in place, as autograd counts it: how a forward that edits weights is found."""
    return tensor._version


def versions_of(state_dict: Mapping[str, Any]) -> Any:
    """What torch keeps beside a state dict's tensors, by module: the versions of their layouts; None: there is none.

    Neither a plain dict nor safetensors has a place for it, and there is no public name.
    """
    return getattr(state_dict, "_metadata", None)


def set_versions(state_dict: Any, versions: Any) -> None:
    """Put beside a state dict's tensors what :func:`versions_of` returned, for `load_state_dict` to find."""
    state_dict._metadata = versions


def is_lazy(module: nn.Module) -> bool:
    """Whether a module has no weights yet, and makes them at its first call. The mixin's method isn't documented."""
    return isinstance(module, LazyModuleMixin) and cast(Any, module).has_uninitialized_params()
