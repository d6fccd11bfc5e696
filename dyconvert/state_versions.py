"""The versions that modules give the values of their state dict.

A module that reads older weights otherwise asks for the version in `_load_from_state_dict`: batch norm, torchvision's
MNASNet. torch keeps versions beside the tensors of a state dict; neither safetensors nor a plain dict has a place
for them.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from dyconvert.torch_internals.modules import set_versions, versions_of


def versions(state: Mapping[str, Any]) -> dict[str, int]:
    """The versions in a state dict that torch made, by module name; those that are 1, as most are, are left out."""
    beside = versions_of(state) or {}
    return {name: each["version"] for name, each in beside.items() if each.get("version", 1) not in (None, 1)}


def with_versions(state: Mapping[str, Any], model: nn.Module, saved: Mapping[str, int] | None) -> dict[str, Any]:
    """A state dict for `model.load_state_dict`.

    Args:
        saved: what :func:`versions` returned when it was saved. None: it isn't known, and taken for the model's own.
    """
    result: Any = OrderedDict(state)
    current: Any = model.state_dict(keep_vars=True)
    own = versions_of(current)
    if saved is not None:
        own = OrderedDict((name, {**each, "version": saved.get(name, 1)}) for name, each in own.items())
    set_versions(result, own)
    return cast(dict[str, Any], result)
