"""Does the converted model compute what the original does?"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dyconvert.arguments import as_call, check_module
from dyconvert.errors import ModelError, brief
from dyconvert.nn import DynamicConv
from dyconvert.outputs import tensors_in
from dyconvert.torch_internals.modules import ConvNd
from dyconvert.torch_internals.trees import tree_map_only
from dyconvert.trial import fresh, kept

# A gradient that should be zero is rounding: below this part of the largest of all, differences are relative to that.
NEGLIGIBLE = 1e-3


@dataclass(frozen=True)
class Difference:
    """How far one tensor is from the original's.

    Attributes:
        output: where the tensor stands in what the model returns, "" if it is all that is returned; or the name of the
            parameter that a gradient is of, or of the conv that returned it.
        absolute: the largest absolute difference.
        relative: that, over the original's largest absolute value.
        count: how many numbers were compared. Those that aren't finite, alike in both, don't count.
    """

    output: str
    absolute: float
    relative: float
    count: int


@dataclass(frozen=True)
class Differences:
    """The differences of all tensors; `absolute`, `relative` and `count` are of the outputs and gradients together.

    Attributes:
        outputs: of the output tensors.
        gradients: of the gradients, where :func:`verify` was asked for them.
        of_convs: the outputs held no number, as a detector's that finds nothing; `outputs` are what the convs returned.
    """

    outputs: tuple[Difference, ...]
    gradients: tuple[Difference, ...] = ()
    of_convs: bool = False

    @property
    def absolute(self) -> float:
        return max((d.absolute for d in (*self.outputs, *self.gradients)), default=0.0)

    @property
    def relative(self) -> float:
        return max((d.relative for d in (*self.outputs, *self.gradients)), default=0.0)

    @property
    def count(self) -> int:
        return sum(d.count for d in (*self.outputs, *self.gradients))

    def __str__(self) -> str:
        what = f"{self.count:,} numbers"
        if self.of_convs:
            what += " that convs return; the outputs hold none"
        if self.gradients:
            what += f", {sum(d.count for d in self.gradients):,} of them gradients"
        return f"largest difference {self.relative:.1e} relative, {self.absolute:.1e} absolute, of {what}"


def verify(model: nn.Module, dynamic: nn.Module, example: Any, *, gradients: bool = False) -> Differences:
    """Run both models in eval mode on `example` and compare every tensor that can be reached in what they return.

    Both run from the same random numbers. Their modes, buffers and attributes are put back, and the global generators.

    Args:
        model: the original.
        dynamic: what it was converted to.
        example: an input tensor, the tuple of the forward's arguments, or a dict of its keyword arguments, on the
            models' device.
        gradients: also compare the gradients of one weighted sum of the outputs, with respect to the original's
            parameters that are trainable, and to the inputs. An expert's gradient is taken for what it gives the kernel
            that it was made from, which is right as long as the predictors are as `convert` made them.

    Raises:
        ModelError: a model rejects the example, or the two return different things; there is no number to compare, or
            not one that is finite.

    Examples:
        >>> import dyconvert, torch
        >>> from dyconvert.builtin import DigitsResNet8
        >>> model, image = DigitsResNet8().eval(), torch.rand(2, 1, 8, 8)
        >>> dynamic = dyconvert.convert(model, g=4, example=image)
        >>> dyconvert.verify(model, dynamic, image).relative < 1e-5
        True
    """
    check_module(model)
    check_module(dynamic, "dynamic")
    differences = compare(model, dynamic, example, gradients=gradients)
    if differences.count:
        return differences
    name = type(model).__name__
    if any(t.numel() for _, t in _run(model, example)):
        raise ModelError(
            f"Not one of the numbers that {name} returns for this example is finite, so nothing can be compared. Check "
            "the model's weights, and give an example like the images that it is for."
        )
    raise ModelError(
        f"There is nothing to compare: no tensor with numbers can be reached in what {name} returns for this example, "
        "and its convs return none. Give an example for which it returns tensors, or compare parts of the models."
    )


def compare(model: nn.Module, dynamic: nn.Module, example: Any, *, gradients: bool = False) -> Differences:
    """As :func:`verify`, but returns differences with a count of 0 where there is nothing to compare."""
    first, second = (_run(each, example) for each in (model, dynamic))
    if _shapes(first) != _shapes(second):
        raise ModelError(
            f"The models return different things: {_said(first)} and {_said(second)}. Was `dynamic` converted from "
            "`model`?"
        )
    outputs = compared(first, second)
    of_convs = not any(t.numel() for _, t in first)
    if of_convs:
        outputs = _compare_convs(model, dynamic, example)
    return Differences(outputs, _compare_gradients(model, dynamic, example) if gradients else (), of_convs)


_Named = list[tuple[str, Tensor]]


def _run(model: nn.Module, example: Any) -> _Named:
    with kept(model), torch.no_grad():
        return [(path, t.detach()) for path, t in _outputs(model, fresh(example))]


def _outputs(model: nn.Module, example: Any) -> _Named:
    try:
        model.eval()  # not model.eval()(...): a user's eval() may return nothing
        args, kwargs = as_call(model, example)
        returned = tensors_in(model(*args, **kwargs))
    except Exception as error:
        raise ModelError(f"{type(model).__name__} rejects the example: {brief(error)}.") from error
    if any(t.is_meta for _, t in returned):
        raise ModelError(
            f"{type(model).__name__} is on the meta device and computes no values. Load its weights first."
        )
    return returned


def _shapes(named: _Named) -> list[tuple[str, torch.Size]]:
    return [(path, t.shape) for path, t in named]


def _said(named: _Named) -> str:
    return ", ".join(f"output{path} {list(t.shape)}" for path, t in named) or "no tensors"


def compared(first: _Named, second: _Named) -> tuple[Difference, ...]:
    """The differences of two lists of tensors with the same names and shapes."""
    return tuple(_difference(path, a, b) for (path, a), (_, b) in zip(first, second, strict=True))


def _difference(path: str, original: Tensor, dynamic: Tensor, least: float = 0.0) -> Difference:
    a, b = (t.detach().to(torch.complex128 if t.is_complex() else torch.float64) for t in (original, dynamic))
    if a.numel() == 0:
        return Difference(path, 0.0, 0.0, 0)
    # If both overflow alike, there is no difference. A NaN on one side alone is an infinite difference.
    alike = (a == b) | (a.isnan() & b.isnan())
    apart = torch.where(alike, 0.0, (a - b).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)
    absolute = apart.max().item()
    size = max(a[a.isfinite()].abs().max().item() if a.isfinite().any() else 0.0, least)
    count = a.numel() - int((alike & ~a.isfinite()).sum())
    return Difference(path, absolute, absolute / size if size else absolute, count)


# ---- What convs return, where a model returns no numbers ----


def _compare_convs(model: nn.Module, dynamic: nn.Module, example: Any) -> tuple[Difference, ...]:
    names = [name for name, module in dynamic.named_modules() if isinstance(module, DynamicConv | ConvNd)]
    first, second = (_calls(each, names, example) for each in (model, dynamic))
    # What comes after a detector's proposals may differ in number by a rounding that ranks them otherwise.
    same = [(a, b) for a, b in zip(first, second, strict=False) if a[0] == b[0] and a[1].shape == b[1].shape]
    return compared([a for a, _ in same], [b for _, b in same])


def _calls(model: nn.Module, names: list[str], example: Any) -> _Named:
    named: _Named = []
    modules = dict(model.named_modules())
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(kept(model))  # before the hooks, for it puts back what hooks keep
        for name in names:
            if name in modules:

                def keep(module: nn.Module, args: Any, output: Any, name: str = name) -> None:
                    named.extend((name, t.detach()) for _, t in tensors_in(output))

                stack.callback(modules[name].register_forward_hook(keep).remove)
        _outputs(model, fresh(example))
    return named


# ---- Gradients ----


def _compare_gradients(model: nn.Module, dynamic: nn.Module, example: Any) -> tuple[Difference, ...]:
    first = _gradients(model, example)
    second = _gradients(dynamic, example)
    modules = dict(dynamic.named_modules())
    for name, gradient in second.items():
        owner, _, kind = name.rpartition(".")
        if gradient is not None and isinstance(modules.get(owner), DynamicConv) and kind in ("weight", "bias"):
            second[name] = _of_kernel(modules[owner], gradient, dynamic)
    # Names that `dynamic` lacks are of parameters that made the weight of a conv, as weight_norm's.
    pairs = [(name, gradient, second[name]) for name, gradient in first.items() if name in second]
    largest = max((g.abs().max().item() for _, g, _ in pairs if g is not None and g.numel()), default=0.0)
    compared = []
    for name, a, b in pairs:
        if a is None:
            if b is None:
                continue
            a = torch.zeros_like(b)
        b = torch.zeros_like(a) if b is None else b
        if a.shape == b.shape:
            compared.append(_difference(name, a, b, least=NEGLIGIBLE * largest))
    return tuple(compared)


def _of_kernel(conv: DynamicConv, gradient: Tensor, model: nn.Module) -> Tensor:
    """The gradient of the static kernel W, from that of the experts :math:`W_i = s W + d_i`: s times their sum."""
    initial = next(m.initial_coefficient for m in model.modules() if hasattr(m, "initial_coefficient"))
    return gradient.unflatten(0, (conv.g, -1)).sum(0) / (conv.g * initial)


def _gradients(model: nn.Module, example: Any) -> dict[str, Tensor | None]:
    """Gradients by the parameters' names, and the inputs' by their number; None where there is none."""
    with kept(model), torch.enable_grad():
        leaves: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
        parameters = len(leaves)

        def tracked(t: Tensor) -> Tensor:
            if not t.is_floating_point():
                return t
            leaf = leaves[f"input {len(leaves) - parameters}"] = t.requires_grad_()
            return leaf.clone()  # a forward may write into its input, but not into a leaf

        example = tree_map_only(Tensor, tracked, fresh(example))
        total = _weighted_sum(_outputs(model, example))
        if total is None:
            return dict.fromkeys(leaves)
        try:
            gradients: Sequence[Tensor | None] = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        except RuntimeError as error:
            if "checkpoint" not in str(error).lower():
                raise ModelError(f"{type(model).__name__} has no gradients: {brief(error)}.") from error
            # Reentrant checkpointing knows only backward().
            again = _weighted_sum(_outputs(model, example))
            gradients = [None] * len(leaves) if again is None else _by_backward(again, list(leaves.values()))
    return dict(zip(leaves, gradients, strict=True))


def _weighted_sum(outputs: _Named) -> Tensor | None:
    """One number that all outputs go into, each entry with a weight of its own; None if none has a gradient."""
    total = None
    for _, output in outputs:
        if output.requires_grad and output.numel():
            values = torch.view_as_real(output) if output.is_complex() else output
            values = torch.where(values.isfinite(), values, 0)
            generator = torch.Generator().manual_seed(values.numel())
            weights = torch.randn(values.shape, generator=generator, device="cpu").to(values)
            part = (values * weights).sum() / values.numel() ** 0.5
            total = part if total is None else total + part.to(total)
    return total


def _by_backward(total: Tensor, leaves: list[Tensor]) -> list[Tensor | None]:
    before = [leaf.grad for leaf in leaves]
    try:
        for leaf in leaves:
            leaf.grad = None
        total.backward()
        return [leaf.grad for leaf in leaves]
    finally:
        for leaf, grad in zip(leaves, before, strict=True):
            leaf.grad = grad
