"""Which batch norms can be folded without changing the model's outputs: shown by running both models on values."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dyconvert.copying import sharing_copy
from dyconvert.differences import compared
from dyconvert.outputs import tensors_in
from dyconvert.randomness import kept_random_state
from dyconvert.surgery.check import TOLERANCE
from dyconvert.surgery.following import trial_runner
from dyconvert.surgery.observe import Observation
from dyconvert.torch_internals.modules import parameter_table
from dyconvert.trial import fresh

Pair = tuple[str, str]
_Named = list[tuple[str, Tensor]]

# A difference this many times what rounding noise in the weights makes is still one of rounding.
_OF_NOISE = 10


def folded_and_agreeing(
    model: nn.Module,
    pairs: Sequence[Pair],
    observed: Observation,
    call: tuple[tuple[Any, ...], dict[str, Any]],
    fold: Callable[[nn.Module, Sequence[Pair]], nn.Module],
) -> tuple[nn.Module, list[Pair]]:
    """Fold the pairs that change neither the model's outputs nor the outputs at each batch norm's place.

    Args:
        fold: makes a copy of the model with these pairs folded.

    Returns:
        The folded model, and its pairs: all of them, unless some disagree.
    """
    comparison = _Comparison(model, [norm for _, norm in pairs], observed, call)

    def agreeing(some: Sequence[Pair]) -> tuple[nn.Module | None, list[Pair]]:
        folded = fold(model, some)
        if comparison.agrees(folded):
            return folded, list(some)
        del folded
        if len(some) < 2:
            return None, []
        half = len(some) // 2
        pairs_left = agreeing(some[:half])[1] + agreeing(some[half:])[1]
        # Each half may agree by itself, and both together not.
        return agreeing(pairs_left) if 0 < len(pairs_left) < len(some) else (None, [])

    folded, pairs_left = agreeing(pairs)
    return fold(model, []) if folded is None else folded, pairs_left


class _Comparison:
    """A model's outputs and its batch norms' in one run, and whether another model's are the same."""

    def __init__(
        self,
        model: nn.Module,
        norms: Sequence[str],
        observed: Observation,
        call: tuple[tuple[Any, ...], dict[str, Any]],
    ) -> None:
        self.model = model
        self.norms = norms
        self.observed = observed
        self.call = call
        self.reference = self._run(model)
        self.tolerance = max(TOLERANCE.get(p.dtype, 1e-3) for p in model.parameters())
        self.noise: list[float] | None = None

    def agrees(self, other: nn.Module) -> bool:
        try:
            outputs = self._run(other)
        except Exception:  # its code asks the batch norm for something
            return False
        apart = _apart(self.reference, outputs)
        if apart is not None and max(apart, default=0.0) <= self.tolerance:
            return True
        # Deep models with random weights amplify rounding, and detectors rank their boxes by it.
        noisy = _apart(self.reference, self._run(_with_noise(self.model)))
        if apart is None or noisy is None:
            return apart is noisy
        return all(a <= max(self.tolerance, _OF_NOISE * b) for a, b in zip(apart, noisy, strict=True))

    def _run(self, model: nn.Module) -> _Named:
        runner = trial_runner(model, self.observed)
        named: _Named = []
        for name in self.norms:
            runner.get_submodule(name).register_forward_hook(_keeper(name, named))
        args, kwargs = fresh(self.call)
        with kept_random_state(), torch.no_grad():
            return named + tensors_in(runner(*args, **kwargs))


def _keeper(name: str, named: _Named) -> Any:
    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        # The moments of each channel of each image, for all the maps of a model are much memory.
        values = output if output.dtype == torch.float64 else output.float()
        values = values.flatten(2) if values.dim() > 2 else values.unsqueeze(-1)
        named.append((name, torch.stack([values.mean(2), values.square().mean(2).sqrt()])))

    return keep


def _apart(first: _Named, second: _Named) -> list[float] | None:
    """The relative difference of each tensor; None if there are others."""
    if [(name, t.shape) for name, t in first] != [(name, t.shape) for name, t in second]:
        return None
    return [difference.relative for difference in compared(first, second)]


def _with_noise(model: nn.Module) -> nn.Module:
    """A copy whose weights are off by a rounding."""
    copy = sharing_copy(model)
    generator = torch.Generator().manual_seed(0)
    for module in copy.modules():
        weight = parameter_table(module).get("weight")
        if weight is not None and weight.dim() > 1 and weight.is_floating_point():
            noise = torch.randn(weight.shape, generator=generator, device="cpu").to(weight)
            eps = torch.finfo(weight.dtype).eps
            parameter_table(module)["weight"] = nn.Parameter(weight.detach() * (1 + eps * noise), weight.requires_grad)
    return copy
