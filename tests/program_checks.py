"""What a conversion changes in a random program: nothing, or the conversion says what it refuses."""

import copy
import random
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_programs import Program, images
from torch import Tensor, nn

import dyconvert

# Rounding alone is 1e-15; batch norm over few pixels makes up to a thousand of it.
CLOSE = 1e-9
# A gradient that should be zero is rounding; below this part of the largest it is compared with that.
NEGLIGIBLE = 1e-3
# Here it depends on all of a batch's values whether an image's output does.
COUPLED = {"branch: a tensor's value"}


@dataclass
class Outcome:
    """What was found.

    Attributes:
        faults: what is not as in the original, each a word and what was seen: "eval: 3.1e-02 at batch 3".
        refused: what the project's own error said, if the program was refused.
        shared, own, static: convs that share a predictor, have their own, or stay static with a reason in the plan.
    """

    faults: list[str] = field(default_factory=list)
    refused: str = ""
    shared: int = 0
    own: int = 0
    static: int = 0

    @property
    def kinds(self) -> set[str]:
        return {fault.partition(":")[0] for fault in self.faults}


def examine(program: Program) -> Outcome:
    """Convert the program and compare all that can be compared."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _examine(program)


def _examine(program: Program) -> Outcome:
    outcome = Outcome()
    model = program.build()
    before = _everything(model)
    seed()
    generators = _generators()
    try:
        plan = dyconvert.plan(model, program.method, program.g, example=images(4))
        dynamic = dyconvert.convert(model, plan)
    except dyconvert.DyconvertError as error:
        outcome.refused = str(error)
        if _everything(model) != before:
            outcome.faults.append("original: the refused conversion changed it")
        return outcome
    except Exception as error:  # any other is a fault
        outcome.faults.append(f"raw error: {type(error).__name__}: {error}")
        return outcome
    for conv in plan.convs:
        if not conv.convert and not conv.reason:
            outcome.faults.append(f"reason: none for {conv.name}")
    outcome.shared = sum(conv.block is not None for conv in plan.converted)
    outcome.own = len(plan.converted) - outcome.shared
    outcome.static = len(plan.convs) - len(plan.converted)
    if _everything(model) != before:
        outcome.faults.append("original: changed by plan() or convert()")
    if _generators() != generators:
        outcome.faults.append("generators: changed by plan() or convert()")
    for check in (_alone, _saved, _eval, _training):
        try:
            check(program, model, dynamic, outcome.faults)
        except dyconvert.DyconvertError as error:
            outcome.faults.append(f"{check.__name__[1:]}: refused after the conversion: {error}")
        except Exception as error:  # the original ran
            text = str(error).strip().splitlines()
            outcome.faults.append(f"raw error: {check.__name__[1:]}, {type(error).__name__}: {text[:1]}")
    return outcome


def seed(number: int = 0) -> None:
    """Set all global generators."""
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


def copied(net: nn.Module) -> nn.Module:
    """A deep copy, also of a pruned conv, whose weight is the result of an operation."""
    attributes = [t for module in net.modules() for t in vars(module).values() if isinstance(t, Tensor)]
    return copy.deepcopy(net, {id(t): t.detach().clone() for t in attributes if not t.is_leaf})


def _generators() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def apart(a: Tensor, b: Tensor, least: float = 1e-30) -> float:
    """The largest difference, relative to the largest number of `a`."""
    if a.shape != b.shape:
        return float("inf")
    if not a.numel():
        return 0.0
    return ((a - b).abs().max() / a.abs().max().clamp(min=least)).nan_to_num(nan=float("inf")).item()


def _state(model: nn.Module, names: list[str]) -> dict[str, Any]:
    """Buffers, and the attributes that are numbers or hold tensors, of the modules with these names."""
    modules = dict(model.named_modules())
    found: dict[str, Any] = {}
    for name in names:
        for key, value in vars(modules[name]).items() if name in modules else ():
            if key.startswith(("_", "dyconvert")) or key in ("training", "conv"):
                continue
            if isinstance(value, bool | int | float | Tensor):
                found[f"{name}.{key}"] = value
            elif isinstance(value, list | dict) and not any(isinstance(each, nn.Module) for each in value):
                found[f"{name}.{key}"] = len(value)
    return found | dict(model.named_buffers())


def _everything(model: nn.Module) -> dict[str, Any]:
    """All that a conversion is not to change in the original, as plain data."""
    names = [name for name, _ in model.named_modules()]
    found = _state(model, names) | dict(model.named_parameters())
    found = {key: value.tolist() if isinstance(value, Tensor) else value for key, value in found.items()}
    for name, module in model.named_modules():
        found[f"{name} mode"] = module.training
        found[f"{name} hooks"] = len(module._forward_hooks) + len(module._forward_pre_hooks)
        for key, value in vars(module).items():
            if isinstance(value, torch.Generator):
                found[f"{name}.{key}"] = value.get_state().tolist()
            elif isinstance(value, random.Random):
                found[f"{name}.{key}"] = value.getstate()
    return found


def _eval(program: Program, model: nn.Module, dynamic: nn.Module, faults: list[str]) -> None:
    model.eval()
    dynamic.eval()
    for batch in (3, 1, 2, 4):
        with torch.no_grad():
            results = _both(model, dynamic, lambda net, n=batch: net(images(n)))
        _compare(*results, "eval", f"at batch {batch}", faults)


def _training(program: Program, model: nn.Module, dynamic: nn.Module, faults: list[str]) -> None:
    """Two calls in training mode: outputs, gradients and what is kept."""
    model.train()
    dynamic.train()
    static = dict(model.named_parameters())
    modules = [name for name, module in model.named_modules() if not isinstance(module, nn.modules.conv._ConvNd)]
    factor = 1 / (program.g * dyconvert.METHODS[program.method].initial_coefficient)
    factor = 1 / (program.g * next((m.initial_coefficient for m in dynamic.modules() if _predicts(m)), factor))
    for step in range(2):
        first, second = _both(model, dynamic, lambda net, n=3 + step: _backward(net, images(n, seed=n)))
        if first[0] is None:
            return  # the original can't be trained so
        _compare(first[0], second[0], "training", f"in step {step}", faults)
        gradients = dict(second[1])
        for name, module in dynamic.named_modules():
            if isinstance(module, dyconvert.DynamicConv):
                for key in (f"{name}.weight", f"{name}.bias"):
                    if gradients.get(key) is not None:
                        gradients[key] = gradients[key].unflatten(0, (module.g, -1)).sum(0) * factor
        size = max((g.abs().max().item() for g in first[1].values() if g is not None), default=0.0)
        for name, gradient in first[1].items():
            if name in gradients:
                zero = torch.zeros_like(static[name])
                a, b = (zero if g is None else g for g in (gradient, gradients[name]))
                if (difference := apart(a, b, least=NEGLIGIBLE * size)) > CLOSE:
                    faults.append(f"gradients: {difference:.1e} of {name} in step {step}")
                    break
    theirs = _state(dynamic, modules)
    for name, value in _state(model, modules).items():
        other = theirs.get(name)
        if isinstance(value, Tensor) and isinstance(other, Tensor):
            _compare(value.double(), other.double(), "state", name, faults)
        elif value != other:
            faults.append(f"state: {name} is {other}, not {value}")


def _predicts(module: nn.Module) -> bool:
    return isinstance(module, dyconvert.CoefficientPredictor)


def _backward(net: nn.Module, x: Tensor) -> tuple[Tensor | None, dict[str, Tensor | None]]:
    net.zero_grad(set_to_none=True)
    output = net(x)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    (output * weights).sum().backward()
    return output.detach(), {name: p.grad for name, p in net.named_parameters()}


def _saved(program: Program, model: nn.Module, dynamic: nn.Module, faults: list[str]) -> None:
    """Saved, and loaded onto the architecture with other weights; the predictors and the experts as training leaves
    them, so that it shows if a conv that runs is none of those that are saved."""
    trained = copied(dynamic)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in trained.modules():
            if isinstance(module, dyconvert.DynamicConv):
                module.weight += 0.1 * torch.randn(module.weight.shape, generator=generator, dtype=module.weight.dtype)
    randomise(trained, generator)
    with tempfile.TemporaryDirectory() as folder:
        dyconvert.save(trained, Path(folder) / "saved")
        loaded = dyconvert.load(Path(folder) / "saved", program.build(seed=1))
    trained.eval()
    loaded.eval()
    with torch.no_grad():
        results = _both(trained, loaded, lambda net: net(images(3)))
    _compare(*results, "loaded", "from its file", faults)


def _alone(program: Program, model: nn.Module, dynamic: nn.Module, faults: list[str]) -> None:
    """With coefficients that differ from image to image, each image's output is as when it is run alone."""
    if program.kinds & COUPLED:
        return
    static, mixing = copied(model), copied(dynamic)
    static.eval()
    mixing.eval()
    randomise(mixing, torch.Generator().manual_seed(1))
    x = images(3)
    with torch.no_grad():
        results = []
        for net in (static, mixing):
            seed()
            whole = copied(net)(x)
            one = []
            for i in range(len(x)):
                seed()
                one.append(copied(net)(x[i : i + 1]))
            results.append(apart(whole, torch.cat(one)))
    # Where the original's images aren't independent of one another, this says nothing.
    if results[0] < CLOSE < results[1]:
        faults.append(f"images: {results[1]:.1e} between an image alone and in a batch")


def randomise(model: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, dyconvert.CoefficientPredictor):
                for parameter in (module.linear.weight, module.linear.bias):
                    parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def _both(first: nn.Module, second: nn.Module, run: Callable[[nn.Module], Any]) -> list[Any]:
    results = []
    for net in (first, second):
        seed()
        results.append(run(net))
    return results


def _compare(a: Tensor, b: Tensor, kind: str, where: str, faults: list[str]) -> None:
    if (difference := apart(a, b)) > CLOSE:
        faults.append(f"{kind}: {difference:.1e} {where}")
