r"""fuse: batch norms folded into the convs before them, for inference.

In eval mode a batch norm is :math:`a \odot y + c` with :math:`a = \gamma / \sigma` and
:math:`c = \beta - a \odot \mu`. After a dynamic conv,

.. math:: a \odot \left(\sum_i \eta^i (w^i * x + b^i)\right) + c = \sum_i \eta^i (a w^i * x + a b^i) + c,

so the scale goes into every expert and its bias. The shift c does not: sigmoid coefficients don't sum to one, so
mixing it would scale it. It becomes the conv's `shift`, which is added after mixing.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvTransposeNd

from dyconvert.arguments import check_module
from dyconvert.copying import clear_hooks, copied, in_eval_mode, on_meta
from dyconvert.errors import ModelError
from dyconvert.marks import mark_fused, remove_marks
from dyconvert.names import holds
from dyconvert.nn import DynamicConv
from dyconvert.nn.convs import DYNAMIC_OF, STATIC_OF, DynamicConvTranspose
from dyconvert.surgery.adapters import unsupported
from dyconvert.surgery.apply import replace_everywhere
from dyconvert.surgery.observe import observe
from dyconvert.surgery.trace import BlockTracer

_DYNAMIC = tuple(STATIC_OF)
_STATIC = tuple(DYNAMIC_OF)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# torchvision's, by name, since importing it takes half a second.
_FROZEN = "FrozenBatchNorm2d"
# timm's, by name, since timm may be absent: a batch norm, then `drop`, then `act`.
_NORMS_WITH_ACTIVATION = {"BatchNormAct2d", "FrozenBatchNormAct2d"}


def fuse(model: nn.Module, example: Any = None, *, bank_dtype: torch.dtype | None = None) -> nn.Module:
    """Fold each batch norm that directly follows a conv, dynamic or static, into that conv.

    For inference only: the outputs are equal in eval mode, and there is no batch norm left to train. What is
    followed by what is read from the data flow, not from names. A conv whose output goes anywhere else as well,
    that is called several times, or that has hooks keeps its batch norm.

    Args:
        model: a converted model, or a static one, in eval mode; left as it is.
        example: an input, or the tuple of the forward's arguments. It matters only where the model can't be traced
            as a whole: a trial run then shows whether a conv is called from elsewhere, too. None: common sizes are
            tried; where none fits, such parts keep their batch norms.
        bank_dtype: `torch.float16` or `torch.bfloat16` keeps the experts in half precision, and the rest of the
            model as it is: half the memory, and at small batches most of a dynamic conv's cost over a static one is
            reading the experts. Outputs are then equal to that precision only.

    Returns:
        A new model of the same class, with `nn.Identity` in the place of the batch norms that were folded. Its
        `dyconvert_fused` lists them: ((conv, batch norm), ...), by name. It can be exported or collapsed; to save
        a model with :func:`~dyconvert.save`, save it before it is fused.

    Raises:
        ModelError: the model or one of its batch norms is in training mode; `bank_dtype` is no half precision; an
            expert doesn't fit into it.

    Examples:
        >>> import dyconvert, torch
        >>> from dyconvert.builtin import DigitsResNet8
        >>> model, image = DigitsResNet8().eval(), torch.rand(2, 1, 8, 8)
        >>> dynamic = dyconvert.convert(model, g=4, example=image)
        >>> fused = dyconvert.fuse(dynamic)
        >>> torch.allclose(fused(image), dynamic(image), atol=1e-4)
        True
    """
    _check_eval(model)
    if bank_dtype not in (None, torch.float16, torch.bfloat16):
        raise ModelError(f"bank_dtype={bank_dtype} isn't half precision. Take torch.float16 or torch.bfloat16.")
    pairs = list(_pairs(model, example))
    result = copied(model)
    modules = dict(result.named_modules())
    identities = {}
    for conv_name, norm_name in pairs:
        conv, norm = modules[conv_name], modules[norm_name]
        _fold(conv, norm)
        identities[norm] = _remainder(norm).eval()
    replace_everywhere(result, identities)
    if bank_dtype is not None:
        for name, module in result.named_modules():
            if isinstance(module, DynamicConv) and not isinstance(module, DynamicConvTranspose):
                module.weight = _halved(name, module.weight, bank_dtype)
    # A plan describes what `convert` makes of the static model, and this is no longer that.
    remove_marks(result)
    mark_fused(result, pairs)
    return result


def _check_eval(model: nn.Module) -> None:
    check_module(model)
    for name, module in model.named_modules():
        if module.training and (module is model or isinstance(module, _BatchNorm)):
            what = f"its batch norm {name}" if name else type(model).__name__
            raise ModelError(
                f"fuse() needs a model in eval mode, and {what} is in training mode, where a batch norm uses its "
                "batch's statistics. Call model.eval() first."
            )


def _is_norm(module: nn.Module) -> bool:
    if type(module) not in _NORMS and type(module).__name__ not in {_FROZEN, *_NORMS_WITH_ACTIVATION}:
        return False
    return module.running_mean is not None and module.running_var is not None


def _is_conv(module: nn.Module) -> bool:
    return type(module) in _DYNAMIC or (type(module) in _STATIC and unsupported(module) is None)


def _remainder(norm: nn.Module) -> nn.Module:
    if type(norm).__name__ in _NORMS_WITH_ACTIVATION:
        return nn.Sequential(norm.drop, norm.act)
    return nn.Identity()


def _pairs(model: nn.Module, example: Any) -> Iterator[tuple[str, str]]:
    """The names of each conv and batch norm that can be fused."""
    bare = in_eval_mode(on_meta(model))
    hooked = {name for name, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks}
    clear_hooks(bare)
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    candidates = list(_pairs_by_graph(bare))
    calls: dict[str, list[Any]] = {}
    if any(region for region, _, _ in candidates):
        # Parts of the model were traced by themselves: does the rest of it call what is in them, too?
        observed = observe(model, {name for _, *pair in candidates for name in pair}, example)
        calls = observed.calls if observed is not None else {}
    for region, conv_name, norm_name in candidates:
        conv, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
        channels = norm.running_mean.numel()
        if channels != conv.out_channels or norm.running_mean.dtype != conv.weight.dtype:
            continue
        if any(owners[id(p)] > 1 for m in (conv, norm) for p in m._parameters.values() if p is not None):
            continue  # tied to another module, which isn't to change
        if any(holds(name, conv_name) != holds(name, norm_name) for name in hooked):
            continue  # a hook sees what is between the two
        if region and not 0 < len(calls.get(conv_name, [])) == len(calls.get(norm_name, [])):
            continue
        yield conv_name, norm_name


def _pairs_by_graph(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(region, conv, norm) from the graph of the whole module, or where it can't be traced, of its children.

    The region is the name of the module that was traced.
    """
    inside = {m for m in module.modules() if not _is_leaf(m) and any(_is_conv(inner) for inner in m.modules())}
    if module not in inside:
        return
    try:
        graph = BlockTracer(inside).trace(module)
    except Exception:  # the forward is any code at all
        for name, child in module.named_children():
            yield from _pairs_by_graph(child, f"{prefix}{name}.")
        return
    called = Counter(node.target for node in graph.nodes if node.op == "call_module")
    # A parameter that the forward uses itself is not to change under it.
    used = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    modules = dict(module.named_modules())
    for node in graph.nodes:
        if node.op != "call_module" or not _is_norm(modules[node.target]) or len(node.all_input_nodes) != 1:
            continue
        source = node.all_input_nodes[0]
        if source.op != "call_module" or not _is_conv(modules[source.target]) or len(source.users) != 1:
            continue
        if called[node.target] == called[source.target] == 1 and not {node.target, source.target} & used:
            yield prefix.rstrip("."), prefix + source.target, prefix + node.target


def _is_leaf(module: nn.Module) -> bool:
    return isinstance(module, (DynamicConv, *_STATIC)) or _is_norm(module)


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
    if isinstance(conv, _ConvTransposeNd):  # the output channel stands second in each group
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
