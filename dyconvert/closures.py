"""Functions, methods and weak references that know parts of a model, made anew for its deep copy.

`deepcopy` takes them as they are: a copy with `self.act = lambda x: conv(x)` goes on calling the original's conv,
trains it, and doesn't save what it computes with.
"""

import copy
import functools
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

# What a deep copy shares with its original, besides functions.
_SHARED: tuple[type, ...] = (type(None), bool, int, float, complex, str, bytes, range, type, types.ModuleType)
_SHARED += (types.CodeType, torch.dtype, torch.device, torch.Size, torch.memory_format, torch.layout)
_PROXIES = (weakref.ProxyType, weakref.CallableProxyType)
_BOUND = (types.MethodType, types.BuiltinMethodType, types.MethodWrapperType)
_CACHED = type(functools.cache(len))
_CONTAINERS: tuple[Any, ...] = (list, tuple, set, frozenset, deque)
# They know objects that deepcopy doesn't copy with them.
_KNOWING = (types.FunctionType, weakref.ReferenceType, *_PROXIES)


class CopiedFunctions:
    """New functions for a deep copy of a model, in place of those that know a part of the original.

    Functions are looked for wherever `deepcopy` goes, and in what those functions close over or have as defaults. Those
    that know no part stay shared, as `deepcopy` has it.
    """

    def __init__(self, model: nn.Module) -> None:
        parts, functions, self._references = _parts_and_functions(model)
        self._reaching, self._functions = _reaching(functions, parts)
        # By the originals' `id`: functions may share one, by `nonlocal`.
        self._cells: dict[int, tuple[types.CellType, types.CellType]] = {}

    def begin(self, memo: dict[int, Any]) -> None:
        """Before `deepcopy`: put functions into its memo that know nothing yet, for what they know may hold them.

        Args:
            memo: that of `deepcopy`, the copies by the originals' `id`.
        """
        for function in self._functions:
            cells = function.__closure__ or ()
            for cell in cells:
                self._cells.setdefault(id(cell), (cell, types.CellType()))
            closure = tuple(self._cells[id(cell)][1] for cell in cells) if cells else None
            new = types.FunctionType(function.__code__, function.__globals__, function.__name__, None, closure)
            new.__qualname__ = function.__qualname__
            memo[id(function)] = new
        for reference in self._references:
            memo[id(reference)] = reference  # deepcopy refuses it, or copies the referent once more

    def end(self, memo: dict[int, Any]) -> None:
        """After `deepcopy`: have new functions, and methods and weak references in the copy, know the copy's parts."""

        def copied(value: Any) -> Any:
            if id(value) in memo or id(value) in self._reaching:
                return _pointing_to_copy(copy.deepcopy(value, memo), memo)
            return value

        for function in self._functions:
            new = memo[id(function)]
            new.__defaults__ = function.__defaults__ and tuple(map(copied, function.__defaults__))
            new.__kwdefaults__ = function.__kwdefaults__ and {
                name: copied(value) for name, value in function.__kwdefaults__.items()
            }
            new.__dict__.update({name: copied(value) for name, value in vars(function).items()})
        for cell, new_cell in self._cells.values():
            if is_full(cell):
                new_cell.cell_contents = copied(cell.cell_contents)
        for holder in [value for number, value in memo.items() if number not in (id(memo), id(value))]:
            _point_to_copies(holder, memo)


def variables_in(model: nn.Module) -> list[types.CellType]:
    """The variables, where they have a value, that functions close over which a model holds, directly or not."""
    return [value for value in _walk([model], _held) if type(value) is types.CellType and is_full(value)]


def is_full(cell: types.CellType) -> bool:
    """Whether a function's variable has a value."""
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def _parts_and_functions(model: nn.Module) -> tuple[set[int], list[types.FunctionType], list[Any]]:
    """What `deepcopy` copies of a model, by `id`; the functions that it meets; and the weak proxies and methods."""
    parts: set[int] = set()
    functions: list[types.FunctionType] = []
    references = []
    for value in _walk([model], lambda value: [] if issubclass(type(value), _KNOWING) else _held(value)):
        kind = type(value)
        if kind is types.FunctionType:
            functions.append(value)
        elif kind in (*_PROXIES, weakref.WeakMethod):
            references.append(value)
        # A tuple without parts is shared, and so may be the empty one by others.
        elif not issubclass(kind, (tuple, frozenset, *_BOUND, weakref.ReferenceType)):
            parts.add(id(value))
    return parts, functions, references


def _reaching(functions: list[types.FunctionType], parts: set[int]) -> tuple[set[int], list[types.FunctionType]]:
    """Of all that functions know, what reaches a part of the model, by `id`; and the functions among that."""
    holders: dict[int, list[int]] = {}

    def known(value: Any) -> list[Any]:
        inner = [] if id(value) in parts else _held(value)
        for part in inner:
            holders.setdefault(id(part), []).append(id(value))
        return inner

    met = {id(value): value for value in _walk(functions, known)}
    reaching: set[int] = set()
    waiting = [number for number in met if number in parts]
    while waiting:
        number = waiting.pop()
        if number not in reaching:
            reaching.add(number)
            waiting += holders.get(number, [])
            if type(met[number]) is types.FunctionType:
                # Another function that shares a variable with this one is to share the new one.
                waiting += [id(cell) for cell in met[number].__closure__ or ()]
    return reaching, [met[number] for number in reaching if type(met[number]) is types.FunctionType]


def _walk(roots: Iterable[Any], inner: Callable[[Any], list[Any]]) -> Iterator[Any]:
    """The roots and what they hold, directly or not, each once."""
    seen: dict[int, Any] = {}  # keeps what it has seen: another object must not get the same `id`
    waiting = list(roots)
    while waiting:
        value = waiting.pop()
        if id(value) not in seen and not issubclass(type(value), _SHARED):
            seen[id(value)] = value
            yield value
            waiting += inner(value)


def _held(value: Any) -> list[Any]:
    """What an object holds that `deepcopy` would copy with it, and what a function or a weak reference knows."""
    kind = type(value)  # not isinstance: a weak proxy says that it is what it refers to
    if kind is types.CellType:
        return [value.cell_contents] if is_full(value) else []
    if kind is types.FunctionType:
        defaults = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        return [*(value.__closure__ or ()), *defaults, *vars(value).values()]
    if issubclass(kind, _BOUND):
        return [value.__self__, getattr(value, "__func__", None)]
    if issubclass(kind, weakref.ReferenceType):
        return [value()]
    if kind in _PROXIES:
        return [_referent(value)]
    inner = list(_attributes(value).values())
    if issubclass(kind, functools.partial):
        inner += [value.func, *value.args, *value.keywords.values()]
    elif issubclass(kind, dict):
        inner += [*dict.keys(value), *dict.values(value)]
    else:
        # The base class's way to go through it: a subclass's may run anything.
        inner += next((base.__iter__(value) for base in _CONTAINERS if issubclass(kind, base)), ())
    return inner


def _attributes(value: Any) -> dict[str, Any]:
    if issubclass(type(value), Tensor):
        return {}
    attributes = dict(getattr(value, "__dict__", {}))
    for kind in type(value).__mro__:
        for name, member in vars(kind).items() if "__slots__" in vars(kind) else ():
            if type(member) is types.MemberDescriptorType:
                with suppress(AttributeError):
                    attributes[name] = member.__get__(value)
    return attributes


def _referent(proxy: Any) -> Any:
    try:
        return proxy.__dir__.__self__
    except ReferenceError:
        return None


def _point_to_copies(holder: Any, memo: dict[int, Any]) -> None:
    """Exchange the functions and weak references in a copied container, and in a copied object's attributes."""
    kind = type(holder)
    if issubclass(kind, (*_SHARED, *_PROXIES, Tensor)):
        return
    items: list[tuple[Any, Any]] = []
    if issubclass(kind, dict):
        items = list(dict.items(holder))
    elif issubclass(kind, (list, deque)):
        items = list(enumerate(holder))
    elif issubclass(kind, set):
        for value in list(holder):
            if (new := _pointing_to_copy(value, memo)) is not value:
                holder.remove(value)
                holder.add(new)
    for key, value in items:
        if (new := _pointing_to_copy(value, memo)) is not value:
            holder[key] = new
    for name, value in _attributes(holder).items():
        if (new := _pointing_to_copy(value, memo)) is not value:
            object.__setattr__(holder, name, new)


def _pointing_to_copy(value: Any, memo: dict[int, Any]) -> Any:
    """`value`, or what stands in its place in a copy; of functions and weak references, alone or in a tuple."""
    kind = type(value)
    if kind is weakref.ReferenceType:
        new = memo.get(id(value()))
        return value if new is None else weakref.ref(new, value.__callback__)
    if kind is weakref.WeakMethod:
        method = value()
        new = _pointing_to_copy(method, memo)
        return value if new is method else weakref.WeakMethod(new)
    if kind in _PROXIES:
        new = memo.get(id(_referent(value)))
        return value if new is None else weakref.proxy(new)
    if kind is types.MethodType:
        function, owner = (memo.get(id(part), part) for part in (value.__func__, value.__self__))
        return value if function is value.__func__ and owner is value.__self__ else types.MethodType(function, owner)
    if kind in _BOUND:
        owner = memo.get(id(value.__self__))
        return value if owner is None else getattr(owner, value.__name__)
    if kind is _CACHED:
        function = memo.get(id(value.__wrapped__))
        return value if function is None else functools.lru_cache(**value.cache_parameters())(function)
    if kind is types.FunctionType:  # from Python 3.14 on, deepcopy looks for no function in its memo
        return memo.get(id(value), value)
    if kind is functools.partial:
        before = [value.func, *value.args, *value.keywords.values()]
        function, *rest = (_pointing_to_copy(part, memo) for part in before)
        if all(new is old for new, old in zip([function, *rest], before, strict=True)):
            return value
        keywords = dict(zip(value.keywords, rest[len(value.args) :], strict=True))
        return functools.partial(function, *rest[: len(value.args)], **keywords)
    if issubclass(kind, (tuple, frozenset)):
        items = [_pointing_to_copy(item, memo) for item in value]
        if any(new is not old for new, old in zip(items, value, strict=True)):
            return kind._make(items) if hasattr(kind, "_make") else kind(items)
    return value
