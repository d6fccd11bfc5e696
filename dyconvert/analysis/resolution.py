"""Resolution against speed-up (DyNet, figure 7): convs cost more at larger inputs, predicting and mixing don't."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from dyconvert.analysis.flops import macs
from dyconvert.analysis.timing import Timing, in_turns
from dyconvert.copying import in_eval_mode, skeleton
from dyconvert.errors import ModelError, brief
from dyconvert.nn import CoefficientPredictor, DynamicConv
from dyconvert.nn.mixing import fast_kernels_of, kernels_of
from dyconvert.nn.mixture import Mixing, Mixture
from dyconvert.nn.transposed import DynamicConvTranspose
from dyconvert.surgery.example import example_for
from dyconvert.surgery.watch import watch_mixtures

# Sizes to time, as shares of the model's own input size.
FACTORS = (0.5, 0.75, 1, 1.5, 2)


def around(image: Any) -> tuple[int, ...]:
    """Sizes in pixels around that of an image `[N, C, H, W]`; none if it isn't one."""
    if not isinstance(image, Tensor) or image.dim() != 4:
        return ()
    own = max(image.shape[-2:])
    # Most models want a multiple of 32; small images leave no room for that.
    step = 32 if own >= 128 else 8 if own >= 32 else 4
    return tuple(sorted({own} | {max(step, round(own * factor / step) * step) for factor in FACTORS if factor != 1}))


class SizeResult(BaseModel):
    """One input size.

    Attributes:
        seconds: of a forward of one image, by model: "original", "dynamic", "narrow"; and of the dynamic model's
            parts alone: "predicting" (all its predictors) and "mixing" (all its kernels).
        macs: multiply-adds, by model.
    """

    size: int
    seconds: dict[str, Timing]
    macs: dict[str, int]

    def latency_reduced(self, of: str = "dynamic", against: str = "original") -> float | None:
        """1 - L_of / L_against: what share of the time is saved; below zero where it takes longer."""
        if of not in self.seconds or against not in self.seconds:
            return None
        return 1 - self.seconds[of].median / self.seconds[against].median

    def macs_reduced(self, of: str = "dynamic", against: str = "original") -> float | None:
        """1 - MACs_of / MACs_against."""
        if of not in self.macs or not self.macs.get(against):
            return None
        return 1 - self.macs[of] / self.macs[against]

    @property
    def overhead(self) -> float | None:
        """The share of the dynamic model's time that predicting and mixing take, each timed alone."""
        if "mixing" not in self.seconds:
            return None
        parts = self.seconds["predicting"].median + self.seconds["mixing"].median
        return min(parts / self.seconds["dynamic"].median, 1.0)


class Resolution(BaseModel):
    """All input sizes.

    Attributes:
        refused: sizes that a model doesn't take, with its reason.
        threads: of torch, on the CPU.
        clock: "wall" or "cpu".
    """

    sizes: list[SizeResult]
    refused: dict[int, str]
    threads: int
    clock: str


def resolution(
    models: dict[str, nn.Module],
    sizes: Sequence[int],
    *,
    repeats: int = 15,
    seconds: float = 5.0,
    cpu: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Resolution:
    """Time the models in turns on one square image of each size.

    Args:
        models: by name: "original", "dynamic" (its predictors and its mixing are timed too), "narrow". All of them
            take images.
        repeats, seconds: per size, see :func:`~dyconvert.analysis.timing.in_turns`.
        cpu: count CPU time.

    Raises:
        ModelError: they take images of none of the sizes, or no images at all.
    """
    if not takes_images(models):
        raise ModelError("Only models of images have a resolution; this one's first conv isn't two-dimensional.")
    # A copy, for the modes and hooks of the user's model stay as they are; it shares all tensors.
    runners = {name: in_eval_mode(skeleton(model, lambda t: t.detach())) for name, model in models.items()}
    timings, refused = [], {}
    for done, size in enumerate(sizes):
        if progress is not None:
            progress(done, len(sizes))
        try:
            timings.append(_one(runners, size, repeats, seconds, cpu))
        except Exception as error:
            refused[size] = str(error) if isinstance(error, ModelError) else brief(error)
    if not timings:
        raise ModelError(f"The model takes none of the sizes {', '.join(map(str, sizes))}: {refused[sizes[0]]}")
    return Resolution(sizes=timings, refused=refused, threads=torch.get_num_threads(), clock="cpu" if cpu else "wall")


def takes_images(models: dict[str, nn.Module]) -> bool:
    firsts = (
        next((m for m in model.modules() if len(getattr(m, "kernel_size", None) or ()) and hasattr(m, "weight")), None)
        if model is not None
        else None
        for model in models.values()
    )
    return all(conv is not None and len(conv.kernel_size) == 2 for conv in firsts)


def _one(models: dict[str, nn.Module], size: int, repeats: int, seconds: float, cpu: bool) -> SizeResult:
    example = example_for(next(iter(models.values())), batch=1, size=(size, size))
    calls = {name: _inference(model, example) for name, model in models.items()}
    if "dynamic" in models and any(isinstance(m, DynamicConv) for m in models["dynamic"].modules()):
        calls |= _parts(models["dynamic"], example)
    place = next((a.device for a in example if isinstance(a, Tensor)), None)
    timings = in_turns(calls, repeats, seconds, cpu, place)
    return SizeResult(size=size, seconds=timings, macs={name: macs(model, example) for name, model in models.items()})


def _inference(model: nn.Module, example: tuple[Any, ...]) -> Callable[[], Any]:
    def run() -> Any:
        with torch.inference_mode():
            return model(*example)

    return run


def _parts(model: nn.Module, example: tuple[Any, ...]) -> dict[str, Callable[[], None]]:
    """The work that the dynamic model adds, alone: each predictor runs on its own input, and all kernels are mixed."""
    runner = skeleton(model, lambda t: t)
    read: list[tuple[nn.Module, Tensor]] = []
    mixed: list[tuple[Callable[[Tensor, Mixing], Tensor], Tensor, Mixing]] = []

    def see(name: str, mixture: Mixture) -> None:
        conv = runner.get_submodule(name)
        mixing = conv.fold(mixture)
        if isinstance(conv, DynamicConvTranspose):
            bank = conv.experts().detach().unflatten(1, (conv.groups, -1)).transpose(2, 3).flatten(1, 2)
            mixed.append((kernels_of, bank, mixing))
        else:
            if mixing.factors is not None:
                mixing = mixing._replace(factors=mixing.factors.flatten(2))
            mixed.append((fast_kernels_of, conv.experts().detach().flatten(2), mixing))

    for module in runner.modules():
        if isinstance(module, CoefficientPredictor):
            module.register_forward_pre_hook(lambda m, args: read.append((m, args[0])))
    watch_mixtures(runner, see)
    with torch.inference_mode():
        runner(*example)
    predictors = [(m.forward, x) for m, x in read]

    def predicting() -> None:
        with torch.inference_mode():
            for predictor, x in predictors:
                predictor(x)

    def mixing() -> None:
        with torch.inference_mode():
            for how, bank, by in mixed:
                how(bank, by)

    return {"predicting": predicting, "mixing": mixing}
