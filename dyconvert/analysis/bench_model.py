"""Times whole models beside their originals."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dyconvert.analysis.timing import Timing, bandwidth, in_turns
from dyconvert.arguments import as_arguments


class ModelResult(NamedTuple):
    """The result of :func:`bench_model`. Times in seconds; `limit` as for a layer, over all banks."""

    batch: int
    training: bool
    static: Timing
    dynamic: Timing
    limit: float
    other: Timing | None = None


def bench_model(
    static: nn.Module,
    dynamic: nn.Module,
    example: Any,
    *,
    other: nn.Module | None = None,
    training: bool = False,
    repeats: int = 15,
    read: float | None = None,
    cpu: bool = False,
) -> ModelResult:
    """A converted model against its original, in turns.

    Args:
        example: an input or the tuple of the forward's arguments, of the batch size to measure.
        other: one more model, to be timed in the same turns.
        training: time a forward, a backward from the outputs' sum, and no optimizer step.
        cpu: count CPU time, see :func:`~dyconvert.analysis.timing.in_turns`.
    """
    arguments = as_arguments(example)
    place = next(a.device for a in arguments if isinstance(a, Tensor))
    read = read or bandwidth(cpu, place)
    calls = {"static": model_call(static, arguments, training), "dynamic": model_call(dynamic, arguments, training)}
    if other is not None:
        calls["other"] = model_call(other, arguments, training)
    timings = in_turns(calls, repeats, seconds=12, cpu=cpu, device=place)
    added = sum(p.numel() * p.element_size() for p in dynamic.parameters())
    added -= sum(p.numel() * p.element_size() for p in static.parameters())
    batch = next(a.shape[0] for a in arguments if isinstance(a, Tensor))
    limit = timings["static"].median + added * (3 if training else 1) / read
    return ModelResult(batch, training, timings["static"], timings["dynamic"], limit, timings.get("other"))


def prepare(
    networks: Iterable[nn.Module], examples: Iterable[tuple[Any, ...]], *, channels_last: bool, compiled: bool
) -> list[tuple[Any, ...]]:
    """Put networks, in place, and their arguments into channels-last format, and have the networks compiled.

    Compiled for the sizes that are timed: a dynamic batch would slow all of them.
    """
    networks, examples = list(networks), list(examples)
    if channels_last:
        for network in networks:
            network.to(memory_format=torch.channels_last)
        examples = [tuple(map(_channels_last, example)) for example in examples]
    if compiled:
        for network in networks:
            network.compile(dynamic=False)
    return examples


def _channels_last(argument: Any) -> Any:
    images = isinstance(argument, Tensor) and argument.dim() == 4
    return argument.contiguous(memory_format=torch.channels_last) if images else argument


def model_call(model: nn.Module, arguments: Sequence[Any], training: bool) -> Callable[[], Any]:
    """A function of no argument that runs `model` once, in training or in inference."""
    model.train(training)

    def step() -> None:
        model.zero_grad()
        out = model(*arguments)
        if not isinstance(out, Tensor):
            out = next(iter(out.values())) if isinstance(out, dict) else out[0]
        out.sum().backward()

    def infer() -> Any:
        with torch.inference_mode():
            return model(*arguments)

    return step if training else infer
