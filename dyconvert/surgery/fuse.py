r"""fuse: batch norms folded into the convs before them, for inference.

In eval mode a batch norm is :math:`a \odot y + c` with :math:`a = \gamma / \sigma` and
:math:`c = \beta - a \odot \mu`. After a dynamic conv,

.. math:: a \odot \left(\sum_i \eta^i (w^i * x + b^i)\right) + c = \sum_i \eta^i (a w^i * x + a b^i) + c,

so the scale goes into every expert and its bias. The shift c does not: sigmoid coefficients don't sum to one, so
mixing it would scale it. It becomes the conv's `shift`, which is added after mixing.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dyconvert.arguments import check_module
from dyconvert.copying import copied
from dyconvert.errors import ModelError, brief
from dyconvert.marks import mark_fused, remove_marks
from dyconvert.nn import DynamicConv
from dyconvert.nn.transposed import DynamicConvTranspose
from dyconvert.surgery.agreeing import Pair, folded_and_agreeing
from dyconvert.surgery.apply import replace_everywhere
from dyconvert.surgery.following import NORMS_WITH_ACTIVATION, pairs_by_graph, shown
from dyconvert.surgery.observe import Observation, observe
from dyconvert.surgery.values import call_with_values
from dyconvert.torch_internals.modules import BatchNorm, ConvTransposeNd

INEXACT = "without it the model computes something else on the example"


def fuse(model: nn.Module, example: Any = None, *, bank_dtype: torch.dtype | None = None) -> nn.Module:
    """Fold each batch norm that directly follows a conv, dynamic or static, into that conv.

    For inference only: the outputs are equal in eval mode, and there is no batch norm left to train. Which follows
    which is read from the graph of the model's code, and seen in runs on real values: a batch norm is folded only if
    both say so. It ends with a comparison: the model and the result run on the example, and a batch norm without which
    anything differs stays. So does that of a conv whose output goes anywhere else, that is called elsewhere too, whose
    weight is read, or that has hooks.

    Args:
        model: a converted model, or a static one, in eval mode; left as it is.
        example: an input, the tuple of the forward's arguments, or a dict of its keyword arguments, for these runs.
            What the model's code does only with other inputs isn't seen. None: noise of a common size.
        bank_dtype: `torch.float16` or `torch.bfloat16` keeps the experts in half precision, and the rest of the
            model as it is: half the memory, and at small batches most of a dynamic conv's cost over a static one is
            reading the experts. Outputs are then equal to that precision only.

    Returns:
        A new model of the same class, with `nn.Identity` in the place of the batch norms that were folded. Its
        `dyconvert_fused` lists them: ((conv, batch norm), ...), by name; its `dyconvert_unfused` says why each other
        batch norm stayed. It can be exported or collapsed; to save a model with :func:`~dyconvert.save`, save it
        before it is fused.

    Raises:
        ModelError: the model or one of its batch norms is in training mode, or on the meta device; it rejects the
            example, or takes none of the common sizes; `bank_dtype` is no half precision; an expert doesn't fit into
            it.

    Examples:
        >>> import dyconvert, torch
        >>> from dyconvert.builtin import DigitsResNet8
        >>> model, image = DigitsResNet8().eval(), torch.rand(2, 1, 8, 8)
        >>> dynamic = dyconvert.convert(model, g=4, example=image)
        >>> fused = dyconvert.fuse(dynamic, image)
        >>> torch.allclose(fused(image), dynamic(image), atol=1e-4)
        True
    """
    _check_eval(model)
    if bank_dtype not in (None, torch.float16, torch.bfloat16):
        raise ModelError(f"bank_dtype={bank_dtype} isn't half precision. Take torch.float16 or torch.bfloat16.")
    pairs, unfused = pairs_by_graph(model)
    if pairs:
        observed, call = _a_call(model, pairs, example)
        try:
            unfused |= shown(model, pairs, observed, call)
        except Exception as error:
            raise ModelError(
                f"{type(model).__name__} fails on {'noise' if example is None else 'the example'}: {brief(error)}. "
                "Give an input that it takes: example=..."
            ) from error
        following = [pair for pair in pairs if pair[1] not in unfused]
        result, pairs = folded_and_agreeing(model, following, observed, call, _folded)
        unfused |= dict.fromkeys({norm for _, norm in following} - {norm for _, norm in pairs}, INEXACT)
    else:
        result = copied(model)
    if bank_dtype is not None:
        for name, module in result.named_modules():
            if isinstance(module, DynamicConv) and not isinstance(module, DynamicConvTranspose):
                module.weight = _halved(name, module.weight, bank_dtype)
    # A plan describes what `convert` makes of the static model, and this is no longer that.
    remove_marks(result)
    order = list(dict(model.named_modules()))
    mark_fused(result, pairs, {norm: unfused[norm] for norm in sorted(unfused, key=order.index)})
    return result


def _check_eval(model: nn.Module) -> None:
    check_module(model)
    for name, module in model.named_modules():
        if module.training and (module is model or isinstance(module, BatchNorm)):
            what = f"its batch norm {name}" if name else type(model).__name__
            raise ModelError(
                f"fuse() needs a model in eval mode, and {what} is in training mode, where a batch norm uses its "
                "batch's statistics. Call model.eval() first."
            )


def _a_call(model: nn.Module, pairs: Sequence[Pair], example: Any) -> tuple[Observation, Any]:
    """A trial run of the model, and a call with values like it."""
    device = next(model.parameters()).device
    if device.type == "meta":
        raise ModelError(
            f"{type(model).__name__} is on the meta device, so that it can't be shown which batch norm follows which "
            "conv. Load its weights first."
        )
    observed = observe(model, {name for pair in pairs for name in pair}, example)
    if observed is None:
        raise ModelError(
            f"{type(model).__name__} takes none of the common input sizes, so that it can't be shown which batch norm "
            "follows which conv. Give an input: fuse(model, example)."
        )
    return observed, call_with_values(model, observed, example, device, 2)


def _folded(model: nn.Module, pairs: Sequence[Pair]) -> nn.Module:
    """A copy of the model with these batch norms in their convs."""
    result = copied(model)
    modules = dict(result.named_modules())
    identities = {}
    for conv_name, norm_name in pairs:
        conv, norm = modules[conv_name], modules[norm_name]
        _fold(conv, norm)
        identities[norm] = _remainder(norm).eval()
    return replace_everywhere(result, identities)


def _remainder(norm: nn.Module) -> nn.Module:
    if type(norm).__name__ in NORMS_WITH_ACTIVATION:
        return nn.Sequential(norm.drop, norm.act)
    return nn.Identity()


def _fold(conv: nn.Module, norm: nn.Module) -> None:
    dtype = conv.weight.dtype
    # In float64: the rounding of sigma would be in every weight.
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    scale = torch.rsqrt(variance + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    if isinstance(conv, DynamicConv):
        conv.scale_outputs(scale)
        if conv.shift is not None:
            shift = shift + conv.shift.detach().double() * scale
        conv.shift = nn.Parameter(shift.to(dtype), requires_grad=False)
        return
    each = scale.view(-1, *[1] * (conv.weight.dim() - 1))
    if isinstance(conv, ConvTransposeNd):  # the output channel stands second in each group
        by_group = scale.view(conv.groups, 1, -1).expand(-1, conv.in_channels // conv.groups, -1)
        each = by_group.reshape(conv.in_channels, -1, *[1] * (conv.weight.dim() - 2))
    conv.weight = _scaled(conv.weight, each)
    if conv.bias is not None:
        shift = shift + conv.bias.detach().double() * scale
    conv.bias = nn.Parameter(shift.to(dtype), requires_grad=False)


def _halved(name: str, weight: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    halved = weight.detach().to(dtype)
    if not halved.isfinite().all():
        raise ModelError(
            f"An expert of {name} doesn't fit into {dtype}. Take torch.bfloat16, which has float32's range."
        )
    return nn.Parameter(halved, requires_grad=False)


def _scaled(parameter: nn.Parameter, scale: Tensor) -> nn.Parameter:
    scaled = (parameter.detach().double() * scale).to(parameter.dtype)
    return nn.Parameter(scaled, requires_grad=parameter.requires_grad)
