"""A plugin for mypy: what a module of torch's holds has any type.

torch says that an attribute it doesn't know is `Tensor | Module`. Models hold numbers, tuples and functions as well, so
that is wrong wherever this package reads what users' models hold. Attributes that our own classes declare keep the type
that they declare.
"""

from collections.abc import Callable

from mypy.plugin import AttributeContext, Plugin
from mypy.types import AnyType, Type, TypeOfAny, UnionType, get_proper_type

_FROM_GETATTR = {"torch._tensor.Tensor", "torch.nn.modules.module.Module"}


class TorchModules(Plugin):
    def get_attribute_hook(self, fullname: str) -> Callable[[AttributeContext], Type] | None:
        return _any_for_unknown


def _any_for_unknown(context: AttributeContext) -> Type:
    found = get_proper_type(context.default_attr_type)
    if isinstance(found, UnionType):
        names = {getattr(get_proper_type(item), "type", None) for item in found.items}
        if {getattr(name, "fullname", None) for name in names} == _FROM_GETATTR:
            return AnyType(TypeOfAny.from_another_any, source_any=AnyType(TypeOfAny.explicit))
    return context.default_attr_type


def plugin(version: str) -> type[Plugin]:
    return TorchModules
