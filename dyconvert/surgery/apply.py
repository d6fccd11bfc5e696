"""Carrying out a plan: dynamic convs in the place of static ones, predictors in the blocks."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dyconvert.copying import skeleton
from dyconvert.errors import PlanError
from dyconvert.marks import mark_plan
from dyconvert.methods import Method
from dyconvert.names import within
from dyconvert.nn import (
    CoefficientPredictor,
    DynamicConv,
    DynamicConv1d,
    DynamicConv2d,
    DynamicConv3d,
    DynamicConvTranspose1d,
    DynamicConvTranspose2d,
    DynamicConvTranspose3d,
)
from dyconvert.surgery.adapters import static_padding, static_weight, unsupported
from dyconvert.surgery.expand import Deviations, empty_bank, expand
from dyconvert.surgery.plan import Plan, PlannedConv
from dyconvert.surgery.rewrite import PREDICTOR, block_class, hand_over, replace_everywhere, shared_forward
from dyconvert.surgery.trace import BlockTrace

# By (transposed, number of spatial dimensions).
_CLASSES = {
    (False, 1): DynamicConv1d,
    (False, 2): DynamicConv2d,
    (False, 3): DynamicConv3d,
    (True, 1): DynamicConvTranspose1d,
    (True, 2): DynamicConvTranspose2d,
    (True, 3): DynamicConvTranspose3d,
}


def carry_out(
    model: nn.Module,
    plan: Plan,
    traces: dict[str, BlockTrace],
    *,
    inplace: bool,
    seed: int,
    diversity: float | None,
    progress: Callable[[str, int, int], None] | None = None,
) -> nn.Module:
    """What :func:`convert` does when the plan is made. `diversity=None` leaves the experts unfilled."""
    static = {entry.name: static_conv(model, entry) for entry in plan.converted}
    if not inplace:
        # The convs' weights are about to be replaced, so the copy may share them with the original until then.
        replaced = {id(t) for conv in static.values() for t in (conv.weight, conv.bias) if t is not None}
        model = skeleton(model, lambda t: t if id(t) in replaced else t.detach().clone())
        static = {name: model.get_submodule(name) for name in static}
    # All that is new is made first: after an error the model is as it was.
    fill = _Expansion(plan.method, seed, diversity)
    generator = torch.Generator().manual_seed(seed)
    replacements = {}
    for done, entry in enumerate(plan.converted, 1):
        predictor = None
        conv = static[entry.name]
        if entry.block is None:
            predictor = _predictor(entry.in_channels, [entry], plan.method, conv, generator)
        replacements[conv] = _dynamic(conv, plan.method, fill, predictor, done)
        if progress is not None:
            progress(entry.name, done, len(static))
    blocks, sources = [], {}
    for block in plan.blocks:
        entries = plan.shared(block.name)
        if not entries:
            continue
        source = shared_forward(traces[block.name], [within(block.name, entry.name) for entry in entries], sources)
        module = model.get_submodule(block.name)
        predictor = _predictor(block.in_channels, entries, plan.method, static[entries[0].name], generator)
        blocks.append((module, block_class(type(module), source), predictor))

    for module, cls, predictor in blocks:
        module.__class__ = cls
        module.add_module(PREDICTOR, predictor.train(module.training))
    model = replace_everywhere(model, replacements)
    mark_plan(model, plan)
    return model


def static_conv(model: nn.Module, entry: PlannedConv) -> nn.Module:
    try:
        conv = model.get_submodule(entry.name)
    except AttributeError:
        raise PlanError(
            f"The plan names the conv {entry.name!r}, which {type(model).__name__} doesn't have. "
            "Plan this model afresh."
        ) from None
    found = (
        tuple(getattr(conv, "kernel_size", ())),
        getattr(conv, "in_channels", 0),
        getattr(conv, "out_channels", 0),
    )
    if found != (entry.kernel_size, entry.in_channels, entry.out_channels):
        raise PlanError(
            f"The plan has {entry.name} as {entry.label}, but the model has {conv}. Plan this model afresh."
        )
    if reason := unsupported(conv):
        raise PlanError(f"{entry.name} can't be converted: {reason}. Skip it: plan.skip({entry.name!r}).")
    return conv


class _Expansion:
    """Makes banks: expanded from the static weights, or unfilled."""

    def __init__(self, method: Method, seed: int, diversity: float | None) -> None:
        self.method = method
        self.diversity = diversity
        self.seed = seed
        self.tables: dict[tuple[torch.dtype, torch.device], Deviations] = {}

    def __call__(self, static: Tensor, number: int, requires_grad: bool) -> nn.Parameter:
        if self.diversity is None:
            return nn.Parameter(empty_bank(static, self.method.g), requires_grad)
        key = static.dtype, static.device
        if key not in self.tables:
            self.tables[key] = Deviations(self.method.g, self.seed, *key)
        # Some prime, so that the convs take their deviations from different places of the table.
        bank = expand(static, self.method, self.tables[key], self.diversity, offset=number * 7919)
        return nn.Parameter(bank, requires_grad)


def _predictor(
    in_channels: int,
    entries: Sequence[PlannedConv],
    method: Method,
    like: nn.Module,
    generator: torch.Generator,
) -> CoefficientPredictor:
    outputs = [entry.out_channels if method.per == "channel" else 1 for entry in entries]
    weight: Tensor = like.weight
    made = CoefficientPredictor(in_channels, outputs, method, generator=generator, dtype=weight.dtype)
    return made.to(weight.device)


def _dynamic(
    conv: nn.Module, method: Method, fill: _Expansion, predictor: CoefficientPredictor | None, number: int
) -> DynamicConv:
    dynamic = _CLASSES[conv.transposed, len(conv.kernel_size)](
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        g=method.g,
        coefficients_per=method.per,
        stride=conv.stride,
        padding=static_padding(conv),
        dilation=conv.dilation,
        groups=conv.groups,
        padding_mode=conv.padding_mode,
        weight=fill(static_weight(conv), 2 * number, conv.weight.requires_grad),
        bias=None if conv.bias is None else fill(conv.bias.detach(), 2 * number + 1, conv.bias.requires_grad),
        coefficient_predictor=predictor,
        **({"output_padding": conv.output_padding} if conv.transposed else {}),
    )
    return hand_over(conv, dynamic)
