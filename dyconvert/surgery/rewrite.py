"""FX: the predictor into the block, its coefficients to the convs.

The block stays what it is; its class becomes a subclass of its own class whose `forward` is the generated
one, as torch's parametrizations do it. So `isinstance(block, Bottleneck)` holds, and attributes, hooks and
state-dict keys are untouched.
"""

import functools
import importlib
import linecache
import operator
import types
from collections.abc import Collection, Sequence
from typing import Any

from torch import fx, nn

from dyconvert.surgery.trace import BlockTrace, conv_nodes, node_named

PREDICTOR = "coefficient_predictor"


def insert_predictor(graph: fx.Graph, reads: str, convs: Sequence[str]) -> None:
    """Call the block's predictor on node `reads`, and give each conv its part of the coefficients."""
    _guard_fixed_inputs(graph)
    source = node_named(graph, reads)
    last_input = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last_input if source.op == "placeholder" else source):
        predicted = graph.call_module(PREDICTOR, (source,))
    after = predicted
    for index, name in enumerate(convs):
        with graph.inserting_after(after):
            after = graph.call_function(operator.getitem, (predicted, index))
        for node in conv_nodes(graph, name):
            node.kwargs = {**node.kwargs, "coefficients": after}


def _guard_fixed_inputs(graph: fx.Graph) -> None:
    """An input that was traced at its default raises an error when it gets another value."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_after(inputs[-1]):
        for node in inputs:
            if "fixed" in node.meta:
                graph.call_function(keep_default, (node, node.meta["fixed"], node.target))


def keep_default(given: Any, default: Any, name: str) -> None:
    """Raise if a block is called with an option that it wasn't converted for."""
    if given is not default and (type(given) is not type(default) or given != default):
        raise RuntimeError(
            f"This block was converted for calls with {name}={default!r}. Convert it with an example whose calls give "
            f"{name}, or give its convs predictors of their own: plan.unshare(block)."
        )


def shared_forward(trace: BlockTrace, convs: Sequence[str], known: dict[Any, "Source"]) -> "Source":
    """The generated forward of a block with a predictor for `convs`, for training and for eval.

    Args:
        known: those made before for this model; blocks with equal graphs get the same one.
    """
    # Most blocks of a model have the same graph, whose code takes longer to generate than to trace.
    key = trace.reads, tuple(convs), _listing(trace.train), _listing(trace.eval)
    if key in known:
        return known[key]
    for graph in (trace.train, trace.eval):
        insert_predictor(graph, trace.reads, convs)
    train, evaluate = (graph.python_code("self") for graph in (trace.train, trace.eval))
    if train.src == evaluate.src:
        known[key] = Source(train.src, None, train.globals)
    else:
        # What follows the train/eval switch, as F.dropout(training=self.training), is fixed in a graph: keep both.
        known[key] = Source(train.src, evaluate.src, train.globals | evaluate.globals)
    return known[key]


def _listing(graph: fx.Graph) -> tuple[Any, ...]:
    return tuple((n.name, n.op, n.target, repr(n.args), repr(n.kwargs), repr(n.type)) for n in graph.nodes)


class Source:
    """The generated code of a forward: hashable, and picklable with what its names refer to."""

    def __init__(self, train: str, evaluate: str | None, names: dict[str, Any]) -> None:
        self.train = train
        self.evaluate = evaluate
        self.names = {key: value for key, value in names.items() if key != "__builtins__"}

    def __hash__(self) -> int:
        return hash((self.train, self.evaluate))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Source) and self._key() == other._key()

    def _key(self) -> tuple[Any, ...]:
        # FX puts `nan` into every graph's scope, which equals nothing.
        return self.train, self.evaluate, {key: value for key, value in self.names.items() if value == value}

    def __getstate__(self) -> dict[str, Any]:
        modules = {key: value.__name__ for key, value in self.names.items() if isinstance(value, types.ModuleType)}
        others = {key: value for key, value in self.names.items() if key not in modules}
        return {"train": self.train, "evaluate": self.evaluate, "modules": modules, "names": others}

    def __setstate__(self, state: dict[str, Any]) -> None:
        names = {key: importlib.import_module(name) for key, name in state["modules"].items()}
        self.__init__(state["train"], state["evaluate"], names | state["names"])

    def compile(self) -> dict[str, Any]:
        """The methods that a block's class gets."""
        if self.evaluate is None:
            return {"forward": _compiled(self.train, self.names)}
        train = _compiled(self.train, self.names)
        evaluate = _compiled(self.evaluate, self.names)

        @functools.wraps(train)
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return train(self, *args, **kwargs) if self.training else evaluate(self, *args, **kwargs)

        return {"forward": forward}


def _compiled(source: str, names: dict[str, Any]) -> Any:
    file = f"<dyconvert block {abs(hash(source)):x}>"
    # So that a traceback shows the generated line.
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    scope = dict(names)
    exec(compile(source, file, "exec"), scope)
    return scope["forward"]


class SharesPredictor:
    """Mixed into the class of each block whose convs share a predictor."""

    _dyconvert_base: type[nn.Module]
    _dyconvert_source: Source

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is generated, so a pickle can't name it; it is made again from base and source.
        _, _, *rest = super().__reduce_ex__(max(int(protocol), 2))
        return (_rebuild, (self._dyconvert_base, self._dyconvert_source), *rest)


@functools.cache
def block_class(base: type[nn.Module], source: Source) -> type[nn.Module]:
    """The subclass of `base` with the generated forward: one for all blocks whose code is the same."""
    attributes = source.compile() | {
        "_dyconvert_base": base,
        "_dyconvert_source": source,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
    }
    return type(f"Dynamic{base.__name__}", (SharesPredictor, base), attributes)


def _rebuild(base: type[nn.Module], source: Source) -> nn.Module:
    cls = block_class(base, source)
    return cls.__new__(cls)


def replace_everywhere(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> nn.Module:
    """Put new modules in the place of old ones, under every name that they have; the model, or what replaces it."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in replacements:
                parent._modules[name] = replacements[child]
    return replacements.get(model, model)


def hand_over(old: nn.Module, new: nn.Module, but: Collection[str] = ()) -> nn.Module:
    """Put onto `new` the hooks, the train/eval switch and whatever else the user has put on `old`; return it."""
    own = vars(nn.Module()).keys() | vars(new).keys() | set(but)
    vars(new).update({name: value for name, value in vars(old).items() if name not in own or "hook" in name})
    return new.train(old.training)
