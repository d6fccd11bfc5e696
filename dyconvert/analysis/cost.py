"""Where the cost is: per block parameters, multiply-adds and time, before and after a conversion."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dyconvert.analysis.flops import parameters
from dyconvert.copying import clear_hooks, in_eval_mode, on_meta, skeleton
from dyconvert.errors import brief
from dyconvert.nn import CoefficientPredictor, DynamicConv
from dyconvert.surgery.plan import Plan
from dyconvert.torch_internals.trees import tree_map_only
from dyconvert.torch_internals.watching import multiply_adds

# The part of a model that is in none of its blocks.
REST = "(the rest)"


class Cost(BaseModel):
    """The cost of a block, or a model, for one image.

    Attributes:
        macs: multiply-adds; None where they couldn't be counted.
        seconds: the median of the measured times; None where nothing was measured.
    """

    parameters: int
    macs: int | None = None
    seconds: float | None = None


class BlockCost(BaseModel):
    """A block, or a conv that stands in none, in the original and in the model."""

    name: str
    convs: int
    dynamic: int
    before: Cost | None
    after: Cost


class ModelCost(BaseModel):
    """The cost of all blocks, and of the whole.

    Attributes:
        predicting, mixing: multiply-adds of the predictors, and of mixing the kernels, of the model.
        note: why something wasn't counted or measured.
    """

    blocks: list[BlockCost]
    before: Cost | None
    after: Cost
    predicting: int
    mixing: int
    note: str | None = None


def units(plan: Plan) -> list[str]:
    """The blocks whose cost is told apart: those of the plan, and each conv that stands in none."""
    names = dict.fromkeys(conv.block if conv.block is not None else conv.name for conv in plan.convs)
    blocks = {conv.block for conv in plan.converted if conv.block is not None}
    return [name for name in names if not any(_inside(name, block) for block in blocks)]


def cost(
    model: nn.Module,
    plan: Plan,
    example: tuple[Any, ...],
    original: nn.Module | None = None,
    *,
    repeats: int = 15,
    seconds: float = 6.0,
    clock: Callable[[], float] = time.perf_counter,
) -> ModelCost:
    """Count and measure the blocks of `model`, and of the `original` in turns with it.

    Args:
        plan: the model's: whose blocks are told apart.
        example: the arguments of the forward, of one image.
        repeats, seconds: rounds of both models, and how long they may take in all; 0 seconds: nothing is timed.
        clock: `time.process_time` counts CPU time.
    """
    names = units(plan)
    models = {"after": model} | ({"before": original} if original is not None else {})
    macs, notes = {}, []
    for key, each in models.items():
        try:
            macs[key] = macs_by_module(each, example)
        except Exception as error:
            macs[key] = {}
            notes.append(f"multiply-adds of {'the original' if key == 'before' else 'the model'}: {brief(error)}")
    times = time_blocks(models, names, example, repeats, seconds, clock) if seconds > 0 else {}

    def of(key: str, name: str | None) -> Cost | None:
        if key not in models or not (name is None or _has(models[key], name)):
            return None
        root = models[key]
        module = root if name is None else root.get_submodule(name)
        counted = macs[key].get(name or "", 0) if macs[key] else None
        return Cost(parameters=parameters(module), macs=counted, seconds=times.get(key, {}).get(name))

    blocks = []
    for name in names:
        inside = [conv for conv in plan.convs if _inside(conv.name, name) or conv.name == name]
        after = of("after", name)
        if after is not None:
            dynamic = sum(conv.convert for conv in inside)
            blocks.append(
                BlockCost(name=name, convs=len(inside), dynamic=dynamic, before=of("before", name), after=after)
            )
    before, after = of("before", None), of("after", None)
    if names != [""]:
        rest = [
            _difference(total, [getattr(b, key) for b in blocks])
            for key, total in (("before", before), ("after", after))
        ]
        blocks.append(BlockCost(name=REST, convs=0, dynamic=0, before=rest[0], after=rest[1]))
    predictors = [name for name, m in model.named_modules() if isinstance(m, CoefficientPredictor)]
    return ModelCost(
        blocks=blocks,
        before=before,
        after=after,
        predicting=sum(macs["after"].get(name, 0) for name in predictors),
        mixing=sum(m.weight.numel() for m in model.modules() if isinstance(m, DynamicConv)),
        note="; ".join(notes) or None,
    )


def macs_by_module(model: nn.Module, example: tuple[Any, ...]) -> dict[str, int]:
    """Multiply-adds of one forward in eval mode, of the model ("") and of each module in it, by its name."""
    try:
        return _counted(on_meta(model), tree_map_only(Tensor, lambda t: t.to("meta"), example))
    except Exception:
        return _counted(skeleton(model, lambda t: t), example)


def _counted(runner: nn.Module, arguments: tuple[Any, ...]) -> dict[str, int]:
    clear_hooks(runner.eval())
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        runner(*arguments)
    return multiply_adds(counter, runner)


def time_blocks(
    models: dict[str, nn.Module],
    names: Sequence[str],
    example: tuple[Any, ...],
    repeats: int = 15,
    seconds: float = 6.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str | None, float]]:
    """Median seconds of each named block in each model, the models in turns; None is the whole model."""
    runners, runs = dict[str, Any](), dict[str, Any]()
    for key, model in models.items():
        runner = in_eval_mode(skeleton(model, lambda t: t.detach()))
        clear_hooks(runner)
        spent: dict[str, float] = {}
        for name in names:
            if name and _has(runner, name):
                _time(runner.get_submodule(name), name, spent, clock)
        runners[key] = runner, spent
        runs[key] = {}
    began = time.perf_counter()
    with torch.inference_mode():
        for round_number in range(repeats + 1):
            if round_number > 3 and time.perf_counter() - began > seconds:
                break
            for key, (runner, spent) in runners.items():
                spent.clear()
                start = clock()
                runner(*example)
                whole = clock() - start
                if round_number:  # the first is for caches
                    for name, took in {**spent, None: whole}.items():
                        runs[key].setdefault(name, []).append(took)
    return {key: {name: statistics.median(took) for name, took in times.items()} for key, times in runs.items()}


def _time(module: nn.Module, name: str, spent: dict[str, float], clock: Callable[[], float]) -> None:
    started = []

    def before(*_: Any) -> None:
        started.append(clock())

    def after(*_: Any) -> None:
        spent[name] = spent.get(name, 0.0) + clock() - started.pop()

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


def _difference(total: Cost | None, parts: list[Cost | None]) -> Cost | None:
    if total is None:
        return None
    known = [part for part in parts if part is not None]

    def left(field: str) -> Any:
        values = [getattr(part, field) for part in known]
        whole = getattr(total, field)
        return None if whole is None or None in values else max(whole - sum(values), 0)

    return Cost(parameters=left("parameters"), macs=left("macs"), seconds=left("seconds"))


def _inside(name: str, block: str) -> bool:
    return name != block and (block == "" or name.startswith(f"{block}."))


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True
