"""Functions that know parts of a model, made anew for its deep copy.

`deepcopy` takes functions as they are: a copy with `self.act = lambda x: conv(x)` goes on calling the original's conv,
trains it, and doesn't save what it computes with.
"""

import functools
import types
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor


def adopt_functions(memo: dict[int, Any]) -> None:
    """Have the functions in a deep copy know the copy's parts.

    Functions are looked for in the attributes, lists and dicts that were copied, and in what those functions close
    over or have as defaults.

    Args:
        memo: that of `deepcopy`, the copies by the originals' `id`.
    """
    adoption = _Adoption(memo)
    holders = list(_holders(memo))
    adoption.renew_cells(value for holder in holders for _, value in _items(holder))
    for holder in holders:
        for key, value in _items(holder):
            if (new := adoption.adopted(value)) is not value:
                holder[key] = new


def _holders(memo: dict[int, Any]) -> Iterator[dict[Any, Any] | list[Any]]:
    """The lists, dicts and tables of attributes that were copied."""
    for number, copy in memo.items():
        if number == id(memo) or isinstance(copy, Tensor):
            continue  # deepcopy keeps there what it must not let go
        if isinstance(copy, (dict, list)):
            yield copy
        if isinstance(attributes := getattr(copy, "__dict__", None), dict):
            yield attributes


def _items(holder: dict[Any, Any] | list[Any]) -> list[tuple[Any, Any]]:
    return list(holder.items() if isinstance(holder, dict) else enumerate(holder))


def cells_in(values: Iterable[Any]) -> dict[int, types.CellType]:
    """The cells, by their `id`, of the functions among some values, and of functions that those know."""
    cells: dict[int, types.CellType] = {}
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if isinstance(value, functools.partial):
            waiting.append(value.func)
        elif isinstance(value, types.FunctionType):
            for cell in value.__closure__ or ():
                if id(cell) not in cells and _is_full(cell):
                    cells[id(cell)] = cell
                    waiting.append(cell.cell_contents)
    return cells


class _Adoption:
    def __init__(self, memo: dict[int, Any]) -> None:
        self.memo = memo
        self.functions: dict[int, types.FunctionType] = {}
        # By the originals' `id`: functions may share one, by `nonlocal`.
        self.cells: dict[int, types.CellType] = {}

    def renew_cells(self, values: Iterable[Any]) -> None:
        """Make a cell for each of those of functions that know a part; functions that share one of them get it too."""
        functions = [value.func if isinstance(value, functools.partial) else value for value in values]
        functions = [function for function in functions if isinstance(function, types.FunctionType)]
        count = -1
        while count < len(self.cells):
            count = len(self.cells)
            for function in functions:
                if self._reaches(function, set()):
                    for cell in function.__closure__ or ():
                        self.cells.setdefault(id(cell), types.CellType())

    def adopted(self, value: Any) -> Any:
        """What stands for `value` in the copy."""
        if isinstance(value, types.FunctionType):
            return self._function(value) if self._reaches(value, set()) else value
        if isinstance(value, functools.partial) and self._reaches(value.func, set()):
            return type(value)(self.adopted(value.func), *value.args, **value.keywords)
        return value

    def _known(self, value: Any) -> Any:
        """As :meth:`adopted`, of what only functions hold, so that `deepcopy` hasn't seen it."""
        copy = self.memo.get(id(value))
        if copy is not None:
            return copy
        if type(value) in (list, tuple, set):
            return type(value)(map(self._known, value))
        if type(value) is dict:
            return {key: self._known(each) for key, each in value.items()}
        if isinstance(value, types.MethodType):
            return types.MethodType(value.__func__, self._known(value.__self__))
        return self.adopted(value)

    def _reaches(self, value: Any, seen: set[int]) -> bool:
        """Whether something in it was copied."""
        if id(value) in seen:
            return False
        seen.add(id(value))
        if id(value) in self.memo:
            return True
        if isinstance(value, types.FunctionType):
            if any(id(cell) in self.cells for cell in value.__closure__ or ()):
                return True
            held = [cell.cell_contents for cell in value.__closure__ or () if _is_full(cell)]
            held += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
        elif isinstance(value, types.MethodType):
            held = [value.__self__]
        elif isinstance(value, functools.partial):
            held = [value.func, *value.args, *value.keywords.values()]
        elif type(value) in (list, tuple, set):
            held = list(value)
        elif type(value) is dict:
            held = list(value.values())
        else:
            return False
        return any(self._reaches(each, seen) for each in held)

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        if id(function) in self.functions:
            return self.functions[id(function)]
        cells = tuple(self.cells.setdefault(id(cell), types.CellType()) for cell in function.__closure__ or ())
        new = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, None, cells if function.__closure__ else None
        )
        self.functions[id(function)] = new  # before what it holds, which may be the function itself
        new.__defaults__ = None if function.__defaults__ is None else tuple(map(self._known, function.__defaults__))
        new.__kwdefaults__ = self._known(function.__kwdefaults__)
        new.__qualname__ = function.__qualname__
        new.__dict__.update(function.__dict__)
        for cell, old in zip(cells, function.__closure__ or (), strict=True):
            if _is_full(old) and not _is_full(cell):
                cell.cell_contents = self._known(old.cell_contents)
        return new


def _is_full(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
