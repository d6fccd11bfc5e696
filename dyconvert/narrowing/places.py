"""Places of operators in a forward: the module, its call, the operator's name, and its number among that name.

Hooks of modules don't see an addition in a block's forward, so a run is watched operator by operator. A number in the
run alone doesn't identify an operator: a model may run other operators for one image than for many (`reshape(-1, C)`,
`contiguous()`, `einsum`, a loop over the images). A place doesn't depend on other operators.
"""

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dyconvert.torch_internals.trees import tree_leaves
from dyconvert.torch_internals.watching import DispatchMode


class Place(NamedTuple):
    """An operator of a forward.

    Attributes:
        module: name of the innermost module that calls it.
        call: number of that module's call, from 0.
        operator: its name, such as "add.Tensor".
        nth: its number among the operators of this name in that call, from 0.
    """

    module: str
    call: int
    operator: str
    nth: int


class CallResult(NamedTuple):
    """A call of a module: the number of the operator that computed its result, and the result's shape."""

    number: int | None
    shape: tuple[int, ...]


class Watch(DispatchMode):
    """Records a forward: each operator's place and inputs, and the results of each module's calls.

    Args:
        model: its modules' calls are followed by hooks while this context is entered.
        listeners: by place, functions that get the operator's output as soon as it is computed.

    Attributes:
        places, arguments, shapes: for each operator, its place, its arguments that aren't tensors, and its output's
            shape.
        inputs: for each operator and each tensor that it reads, the number of the operator that computed the tensor;
            None if it was there before.
        calls: by module name, its calls in order.
        returned: the numbers of the operators whose outputs the model returns.
    """

    def __init__(self, model: nn.Module, listeners: dict[Place, list[Callable[[Tensor], None]]] | None = None) -> None:
        super().__init__()
        self.places: list[Place] = []
        self.inputs: list[list[int | None]] = []
        self.arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.shapes: list[tuple[int, ...]] = []
        self.calls: dict[str, list[CallResult]] = {}
        self.returned: set[int] = set()
        self._model = model
        self._listeners = listeners or {}
        self._producers: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._stack: list[tuple[str, int, Counter[str]]] = [("", 0, Counter())]
        self._called: Counter[str] = Counter()
        self._handles: list[Any] = []

    def number(self, value: Any) -> int | None:
        """The number of the operator that computed this tensor; None if no operator of this run did."""
        place = self._producers.get(id(value))
        return place[1] if place is not None and place[0]() is value else None

    def __enter__(self) -> "Watch":
        for name, module in self._model.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._enter(name), prepend=True))
            self._handles.append(module.register_forward_hook(self._leave(name), always_call=True))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self._stack.append((name, self._called[name], Counter()))
            self._called[name] += 1

        return hook

    def _leave(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._stack.pop()
            shape = tuple(output.shape) if isinstance(output, Tensor) else ()
            self.calls.setdefault(name, []).append(CallResult(self.number(output), shape))
            if not name:
                self.returned = {self.number(leaf) for leaf in tree_leaves(output)} - {None}

        return hook

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        reads = [self.number(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        output = func(*args, **kwargs)
        module, call, counts = self._stack[-1]
        operator = func.__name__
        place = Place(module, call, operator, counts[operator])
        counts[operator] += 1
        number = len(self.places)
        self.places.append(place)
        self.inputs.append(reads)
        plain = tuple(None if isinstance(value, Tensor | list) else value for value in args)
        self.arguments.append((plain, {k: v for k, v in kwargs.items() if not isinstance(v, Tensor)}))
        results = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        self.shapes.append(tuple(results[0].shape) if results else ())
        for leaf in results:
            self._note(leaf, number)
        for tell in self._listeners.get(place, ()):
            tell(output if isinstance(output, Tensor) else output[0])
        return output

    def _note(self, t: Tensor, number: int) -> None:
        key, places = id(t), self._producers
        # Another tensor may get the same id once this one is gone.
        places[key] = weakref.ref(t, lambda _: places.pop(key, None)), number


@torch.no_grad()
def watched(
    model: nn.Module,
    arguments: tuple[Any, ...],
    listeners: dict[Place, list[Callable[[Tensor], None]]] | None = None,
) -> Watch:
    """Run the model once, and return its record."""
    watch = Watch(model, listeners)
    with watch:
        model(*arguments)
    return watch
