"""collapse: a dynamic model back to a static one, each conv at one set of coefficients."""

import warnings
from collections.abc import Iterable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from dyconvert.arguments import check_module
from dyconvert.copying import in_eval_mode, skeleton
from dyconvert.errors import ModelError, some
from dyconvert.marks import forget_compression, remove_marks
from dyconvert.nn import CoefficientPredictor, DynamicConv
from dyconvert.nn.counterparts import STATIC_OF
from dyconvert.nn.handing import sharing_blocks, unshare
from dyconvert.nn.mixture import Mixture
from dyconvert.nn.padding import TF_SAME
from dyconvert.surgery.apply import hand_over, replace_everywhere
from dyconvert.surgery.watch import predictor_of, run_over, watch_mixtures

# Attributes that only a dynamic conv has; all others are the static conv's, or what the user has put on it.
_DYNAMIC_ONLY = {"g", "sizes", "initial_coefficient", "_explicit_padding", "_handed"}
_DYNAMIC_ONLY |= {"coefficient_predictor", "block_predictor"}


def collapse(model: nn.Module, coefficients: str | Iterable[Any] = "initial") -> nn.Module:
    r"""A static model of the original class and state-dict keys, from a dynamic one.

    Each conv gets the one kernel :math:`\sum_i \bar\eta^i w^i`, and likewise its bias. **This is exact only
    where the coefficients are constant**: of a conversion that wasn't trained, `"initial"` gives back the
    original weights (up to rounding). A trained model's coefficients vary from image to image, which is what it
    gained; collapsed, it loses that, and needs to be measured again, or fine-tuned.

    Args:
        model: a converted model, trained or not; left as it is.
        coefficients: `"initial"`: what a predictor with zero logits gives, 0.5 (sigmoid) or 1/g (softmax).
            Or a data loader, or any iterable of batches: the mean coefficients over its images, in eval mode.
            A batch is a tensor, a tuple or list whose first item is the input, or a dict of the forward's
            arguments (of a dict without any, the first value is the input). Batches are moved to the model's
            device and floating-point dtype, and seen one at a time.

    Returns:
        A new model: blocks of their original classes, no predictors, and convs that keep their attributes,
        hooks, dtype, device, memory format, `requires_grad` and train/eval mode. A conv that standardised its
        weight (timm's StdConv2d) comes back as a plain one with the standardised weight.

    Raises:
        ModelError: nothing in the model is dynamic; no batch was given, or the model rejects one; the
            coefficients over it aren't finite.

    Warns:
        UserWarning: the data never reached some convs (an auxiliary head that runs in training only, say). They
            are collapsed at the initial coefficients.

    Examples:
        >>> import dyconvert, torch
        >>> from dyconvert.builtin import DigitsResNet8
        >>> model, image = DigitsResNet8().eval(), torch.rand(2, 1, 8, 8)
        >>> dynamic = dyconvert.convert(model, g=4, example=image)
        >>> static = dyconvert.collapse(dynamic)
        >>> torch.allclose(static.conv1.weight, model.conv1.weight, atol=1e-6)
        True
    """
    check_module(model)
    convs = {name: m for name, m in model.named_modules() if isinstance(m, DynamicConv)}
    if not convs:
        raise ModelError(f"{type(model).__name__} has no dynamic conv, so there is nothing to collapse.")
    predictors = {name: predictor_of(model, name) for name in convs}
    chosen = {name: _initial(predictors[name], convs[name]) for name in convs}
    if isinstance(coefficients, str):
        if coefficients != "initial":
            raise ModelError(f"collapse() takes 'initial' or batches of data as coefficients, not {coefficients!r}.")
    else:
        chosen |= mean_mixtures(model, coefficients)

    # The copy may share what won't be part of it.
    left_behind = {id(p) for m in (*convs.values(), *predictors.values()) for p in m.parameters()}
    result = skeleton(model, lambda t: t if id(t) in left_behind else t.detach().clone())
    replacements: dict[nn.Module, nn.Module] = {}
    for name in convs:
        conv = cast(DynamicConv, result.get_submodule(name))
        replacements[conv] = _static(conv, chosen[name], predictors[name].linear.bias.dtype)
    for _, block, _ in list(sharing_blocks(result)):
        unshare(block)
    result = replace_everywhere(result, replacements)
    # The plan and the source describe the dynamic model; narrowed layers stay narrow.
    remove_marks(result, but_narrowing=True)
    forget_compression(result)
    return result


def _divided(count: int, total: Tensor) -> Tensor:
    return total / count


def mean_mixtures(model: nn.Module, batches: Iterable[Any]) -> dict[str, Mixture]:
    """The mean mixture of each dynamic conv over the images, in eval mode, in float64.

    A conv that is called several times per image is averaged over its calls.

    Args:
        model: a converted model; left as it is.
        batches: as :func:`collapse` takes them.

    Returns:
        That of each conv that was called, as one image's, by the conv's name; each axis is averaged by itself.

    Raises:
        ModelError: as in :func:`collapse`.

    Warns:
        UserWarning: some convs were not called.
    """
    # A copy that shares all tensors: its mode and its hooks can be changed. The user's own hooks stay, for they may
    # be part of what the model computes.
    runner = in_eval_mode(skeleton(model, lambda t: t.detach()))
    sums: dict[str, Mixture] = {}
    calls: dict[str, int] = {}

    def add(name: str, mixture: Mixture) -> None:
        total = mixture.map(lambda axis: axis.detach().double().sum(0, keepdim=True))
        if name in sums:
            before = sums[name].axes()
            total = Mixture(**{axis: value + before[axis] for axis, value in total.axes().items()})
        sums[name] = total
        calls[name] = calls.get(name, 0) + mixture.experts.shape[0]

    names = [name for name, module in runner.named_modules() if isinstance(module, DynamicConv)]
    watch_mixtures(runner, add)
    run_over(runner, batches)
    means = {name: total.map(partial(_divided, calls[name])) for name, total in sums.items() if calls[name]}
    if broken := [
        name for name, mean in means.items() if not all(axis.isfinite().all() for axis in mean.axes().values())
    ]:
        raise ModelError(f"The coefficients of {broken[0]} over the data aren't finite. Look for NaN in the images.")
    if missing := [name for name in names if name not in means]:
        warnings.warn(f"The data never reached {some(missing)}: collapsed at the initial coefficients.", stacklevel=3)
    return means


def _initial(predictor: CoefficientPredictor, conv: DynamicConv) -> Mixture:
    return Mixture(torch.full((1, conv.g, 1), predictor.initial_coefficient, dtype=torch.float64))


def _static(dynamic: DynamicConv, mixture: Mixture, dtype: torch.dtype) -> nn.Module:
    cls = STATIC_OF.get(type(dynamic))
    if cls is None:
        raise ModelError(f"collapse() doesn't know which static conv a {type(dynamic).__name__} goes back to.")
    tf_same = dynamic.padding == TF_SAME
    static = cls(
        dynamic.in_channels,
        dynamic.out_channels,
        dynamic.kernel_size,
        stride=dynamic.stride,
        padding=0 if tf_same else dynamic.padding,
        dilation=dynamic.dilation,
        groups=dynamic.groups,
        bias=dynamic.bias is not None or dynamic.shift is not None,
        padding_mode=dynamic.padding_mode,
        device="meta",
        **({"output_padding": dynamic.output_padding} if dynamic.transposed else {}),
    )
    if tf_same:  # only timm's convs pad like that
        import timm.layers

        static.__class__ = timm.layers.Conv2dSame  # type: ignore[attr-defined]
    # In float64, for the experts' differences are to cancel. Those of a fused or compressed model may have fewer bits.
    weight, bias = dynamic.mixed(mixture)
    static.weight = nn.Parameter(weight.to(dtype), dynamic.weight.requires_grad)
    if bias is not None:
        trains = dynamic.bias is not None and dynamic.shift is None and dynamic.bias.requires_grad
        static.bias = nn.Parameter(bias.to(dtype), trains)
    return hand_over(dynamic, static, but=_DYNAMIC_ONLY)
