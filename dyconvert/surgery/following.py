"""Which batch norms follow which convs: read from the data flow, and seen in runs on real values.

A graph says what a module's code does with whatever it is given, but believes what a stand-in for a tensor answers: the
wrong branch of an `isinstance`, an optional argument that is there. A run says what is done with real tensors, but only
for those that it was given. A batch norm follows a conv if both say so.
"""

import gc
import inspect
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dyconvert.arguments import map_tensors
from dyconvert.copying import clear_hooks, copied, in_eval_mode, on_meta, sharing_copy
from dyconvert.names import holds
from dyconvert.nn import DynamicConv
from dyconvert.nn.counterparts import DYNAMIC_OF, STATIC_OF
from dyconvert.randomness import kept_random_state
from dyconvert.surgery.adapters import unsupported
from dyconvert.surgery.hooks import is_hooked
from dyconvert.surgery.observe import Observation
from dyconvert.surgery.recording import HARMLESS, name_of
from dyconvert.surgery.trace import BlockTracer
from dyconvert.torch_internals.modules import parameter_table
from dyconvert.torch_internals.trees import tree_leaves
from dyconvert.trial import fresh

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# torchvision's, by name, since importing it takes half a second.
_FROZEN = "FrozenBatchNorm2d"
# timm's, by name, since timm may be absent: a batch norm, then `drop`, then `act`.
NORMS_WITH_ACTIVATION = {"BatchNormAct2d", "FrozenBatchNormAct2d"}

# What a conv's output, and its weight, answer alike before and after a batch norm goes into the conv.
_SAME_ANSWERS = HARMLESS | {"shape", "size", "numel", "nelement", "__len__", "stride", "is_contiguous", "itemsize"}

FOLLOWS_NONE = "it directly and only follows no conv, as far as the graph of its module shows"


def is_norm(module: nn.Module) -> bool:
    """Whether the module is a batch norm that :func:`~dyconvert.fuse` knows, with statistics."""
    if type(module) not in _NORMS and type(module).__name__ not in {_FROZEN, *NORMS_WITH_ACTIVATION}:
        return False
    return module.running_mean is not None and module.running_var is not None and "forward" not in vars(module)


def _is_conv(module: nn.Module) -> bool:
    return type(module) in STATIC_OF or (type(module) in DYNAMIC_OF and unsupported(module) is None)


# ---- What graphs say ----


def pairs_by_graph(model: nn.Module) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """The names of each conv and the batch norm that may go into it, and why each other batch norm may not."""
    bare = in_eval_mode(on_meta(model))
    hooked = [name for name, m in model.named_modules() if is_hooked(m)]
    clear_hooks(bare)
    owners = Counter(id(p) for m in model.modules() for p in parameter_table(m).values() if p is not None)
    reasons = {name: FOLLOWS_NONE for name, module in model.named_modules() if is_norm(module)}
    pairs = []
    for conv_name, norm_name in _traced(bare):
        conv, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
        tensors = [p for m in (conv, norm) for p in parameter_table(m).values() if p is not None]
        if norm.running_mean.numel() != conv.out_channels or norm.running_mean.dtype != conv.weight.dtype:
            reasons[norm_name] = f"it has other channels than {conv_name}, or another dtype"
        elif any(owners[id(p)] > 1 for p in tensors):
            reasons[norm_name] = f"its weight, or that of {conv_name}, is tied to another module's"
        elif any(holds(name, conv_name) != holds(name, norm_name) for name in hooked):
            reasons[norm_name] = f"a hook sees what {conv_name} gives it"
        else:
            pairs.append((conv_name, norm_name))
            del reasons[norm_name]
    return pairs, reasons


def _traced(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Pairs from the graph of the whole module, or where it can't be traced, of its children."""
    inside = {m for m in module.modules() if not _is_leaf(m) and any(_is_conv(inner) for inner in m.modules())}
    if module not in inside:
        return
    try:
        graph = BlockTracer(inside).trace(module)
    except Exception:  # the forward is any code at all
        for name, child in module.named_children():
            yield from _traced(child, f"{prefix}{name}.")
        return
    called = Counter(node.target for node in graph.nodes if node.op == "call_module")
    # A parameter that the forward uses itself is not to change under it.
    used = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    modules = dict(module.named_modules())
    for node in graph.nodes:
        if node.op != "call_module" or not is_norm(modules[node.target]) or len(node.all_input_nodes) != 1:
            continue
        source = node.all_input_nodes[0]
        if source.op != "call_module" or not _is_conv(modules[source.target]) or len(source.users) != 1:
            continue
        if called[node.target] == called[source.target] == 1 and not {node.target, source.target} & used:
            yield prefix + source.target, prefix + node.target


def _is_leaf(module: nn.Module) -> bool:
    return isinstance(module, (DynamicConv, *DYNAMIC_OF)) or is_norm(module)


# ---- What runs show ----


def shown(
    model: nn.Module, pairs: list[tuple[str, str]], observed: Observation, call: tuple[tuple[Any, ...], dict[str, Any]]
) -> dict[str, str]:
    """Why a batch norm doesn't follow its conv in runs of the model, for each that doesn't.

    Code may branch on the images' number, size and values, and on whether gradients are wanted: the call is varied in
    these. What a varied call shows counts only where the model takes it.
    """
    reasons: dict[str, str] = {}
    for number, (args, kwargs, grad) in enumerate(_varied(model, call)):
        unexplained = [pair for pair in pairs if pair[1] not in reasons]
        runner = trial_runner(model, observed)
        watch = _Flow(runner, unexplained)
        try:
            with kept_random_state(), torch.enable_grad() if grad else torch.no_grad():
                failures = watch.run(*fresh(args), kwargs=fresh(kwargs), kept=not grad)
        except Exception:
            if number == 0:
                raise
            continue  # it doesn't take this: nothing is shown
        reasons |= {norm: reason for norm, reason in failures.items() if number == 0 or reason != NOT_CALLED}
    return reasons


def trial_runner(model: nn.Module, observed: Observation) -> nn.Module:
    """A copy of the model with its values, in eval mode, for one run: with the user's hooks only if it needs them."""
    runner = in_eval_mode(sharing_copy(copied(model) if observed.edits else model))
    if not observed.hooked:
        clear_hooks(runner)
    return runner


NOT_CALLED = "it isn't called with this example"


class _Flow(TorchFunctionMode):
    """Sees where the outputs of convs go in one run of a model, and who is given weights."""

    def __init__(self, model: nn.Module, pairs: Iterable[tuple[str, str]]) -> None:
        super().__init__()
        self.model = model
        self.pairs = list(pairs)
        self.calls: dict[str, list[Any]] = {name: [] for pair in self.pairs for name in pair}
        self.misused: dict[str, str] = {}  # by the conv's or the norm's name
        self.around: list[str] = []
        self.outputs: dict[int, tuple[Any, str]] = {}
        self.owners: dict[int, str] = {}
        for name in self.calls:
            module = model.get_submodule(name)
            self.owners |= {id(t): name for t in (*module.parameters(False), *module.buffers(False))}
        for conv, norm in self.pairs:
            model.get_submodule(conv).register_forward_pre_hook(self._entering(conv))
            model.get_submodule(conv).register_forward_hook(self._made(conv))
            model.get_submodule(norm).register_forward_pre_hook(self._taken(norm), with_kwargs=True)
            model.get_submodule(norm).register_forward_hook(self._leaving)

    def run(self, *args: Any, kwargs: Mapping[str, Any], kept: bool) -> dict[str, str]:
        """Why each norm doesn't follow its conv, where it doesn't.

        Args:
            kept: also ask whether the model keeps or returns an output; what gradients need would look so.
        """
        with self:
            returned = self.model(*args, **kwargs)
        alive: set[str] = set()
        if kept:
            if any(ref() is not None for ref, _ in self.outputs.values()):
                gc.collect()
            alive = {conv for ref, conv in self.outputs.values() if ref() is not None}
        del returned
        return {norm: reason for conv, norm in self.pairs if (reason := self._reason(conv, norm, alive))}

    def _reason(self, conv: str, norm: str, alive: set[str]) -> str | None:
        calls = self.calls[norm]
        if not calls and not self.calls[conv]:
            return NOT_CALLED
        for name in (conv, norm):
            if name in self.misused:
                return self.misused[name]
        if any(source != conv for source in calls) or len(calls) != len(self.calls[conv]):
            return f"its input isn't always what {conv} returns, or {conv} is called elsewhere too"
        return f"what {conv} returns is also kept, or returned by the model" if conv in alive else None

    def _entering(self, name: str) -> Any:
        return lambda module, args: self.around.append(name)

    def _leaving(self, module: nn.Module, args: Any, output: Any) -> None:
        self.around.pop()

    def _made(self, conv: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.around.pop()
            self.calls[conv].append(None)
            if isinstance(output, Tensor):
                self.outputs[id(output)] = weakref.ref(output), conv

        return hook

    def _taken(self, norm: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            values = [*args, *kwargs.values()]
            self.calls[norm].append(self._source(values[0]) if len(values) == 1 else None)
            self.around.append(norm)

        return hook

    def _source(self, value: Any) -> str | None:
        ref, conv = self.outputs.get(id(value), (None, None))
        return conv if ref is not None and ref() is value else None

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        what = name_of(function)
        if what not in _SAME_ANSWERS:
            for t in tree_leaves((args, kwargs)):
                if isinstance(t, Tensor):
                    self._given(t, what)
        return function(*args, **kwargs)

    def _given(self, t: Tensor, what: str) -> None:
        owner = self.owners.get(id(t))
        if owner is not None and owner not in self.around:
            self.misused.setdefault(owner, f"{owner}'s weight is used outside of its own forward ({what})")
        conv = self._source(t)
        taken = any(self.around[-1:] == [norm] for source, norm in self.pairs if source == conv)
        if conv is not None and not taken:
            self.misused.setdefault(conv, f"what {conv} returns is also given to {what}")


def _varied(
    model: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]]
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any], bool]]:
    """The call; its first image; half of its size, negated, without and with gradients; with each switch turned."""
    args, kwargs = call
    yield args, kwargs, False
    yield *map_tensors(lambda t: t[:1] if t.dim() else t, call), False
    halved = map_tensors(_halved, call)
    yield *halved, False
    yield *halved, True
    count = len(args)
    for index, parameter in enumerate(inspect.signature(model.forward).parameters.values()):
        if index >= count and parameter.name not in kwargs and isinstance(parameter.default, bool):
            yield halved[0], {**halved[1], parameter.name: not parameter.default}, False


def _halved(t: Tensor) -> Tensor:
    if t.dim() >= 3:
        t = t[(slice(None), slice(None), *[slice(0, n // 2 if n >= 16 else n) for n in t.shape[2:]])]
    return -t if t.is_floating_point() else t
