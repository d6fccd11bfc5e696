"""Whatever a net is made of, its conversion computes the same, and what is not converted is untouched."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from random_nets import Net, nets
from torch import Tensor, nn

import dyconvert
from dyconvert.nn.handing import mixture_for

# Rounding alone, 1e-15, in eval mode.
EVAL = 1e-9
# Batch norm over a few pixels divides by variances that may be small.
TRAINING = 1e-6

METHODS = tuple(dyconvert.METHODS)
REPEATABLE = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)


@REPEATABLE
@given(net=nets(), method=st.sampled_from(METHODS), g=st.sampled_from((2, 3)))
def test_a_random_net_and_its_conversion(net: Net, method: str, g: int) -> None:
    model = net.build()
    plan = dyconvert.plan(model, method, g, example=net.images(1))
    check_plan(model, plan)
    event(f"{len(plan.blocks) > 0} shared, {any(conv.note for conv in plan.convs)} untraceable")
    if not plan.converted:
        with pytest.raises(dyconvert.PlanError):
            dyconvert.convert(model, plan)
        return
    dynamic = dyconvert.convert(model, plan)
    check_state_dict(model, dynamic, plan)
    for batch in (1, 3):
        assert apart(model(net.images(batch)), dynamic(net.images(batch))) < EVAL
    check_mixing(net, model, dynamic)
    check_training(net, dyconvert.convert(model, plan))


def apart(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return ((a - b).abs().max() / a.abs().max()).item()


def check_plan(model: nn.Module, plan: dyconvert.Plan) -> None:
    """Every conv is converted or skipped with a reason; those that share do so in a block that is listed."""
    convs = {name for name, module in model.named_modules() if isinstance(module, nn.modules.conv._ConvNd)}
    assert {conv.name for conv in plan.convs} == convs
    blocks = {block.name for block in plan.blocks}
    for conv in plan.convs:
        assert conv.convert or conv.reason
        assert conv.block is None or conv.block in blocks


def check_state_dict(model: nn.Module, dynamic: nn.Module, plan: dyconvert.Plan) -> None:
    static, converted = model.state_dict(), dynamic.state_dict()
    # A module may have several names, the plan has its first.
    banks = {conv.data_ptr() for name in plan.converted for conv in model.get_submodule(name.name).parameters()}
    for key, tensor in static.items():
        if tensor.data_ptr() in banks:
            assert converted[key].shape == (plan.method.g * tensor.shape[0], *tensor.shape[1:])
        else:
            assert torch.equal(converted[key], tensor)
    assert all("_predictor." in key for key in converted.keys() - static.keys())


def check_training(net: Net, dynamic: nn.Module) -> None:
    """The same outputs with the same random numbers, and gradients that are finite."""
    model = net.build().train()
    dynamic.train()
    results = []
    for each in (model, dynamic):
        torch.manual_seed(0)
        results.append(each(net.images(3)))
    assert apart(*results) < TRAINING
    results[1].square().mean().backward()
    for name, parameter in dynamic.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def check_mixing(net: Net, model: nn.Module, dynamic: nn.Module) -> None:
    """With coefficients that differ, each image's output is that of the static net with the kernels they mix."""
    generator = torch.Generator().manual_seed(0)
    for module in dynamic.modules():
        if isinstance(module, dyconvert.CoefficientPredictor):
            with torch.no_grad():
                module.linear.weight.normal_(0, 1, generator=generator)
                module.linear.bias.normal_(0, 1, generator=generator)
    images = net.images(2)
    with torch.no_grad():
        used, mixed = record(dynamic, images)
        for index in range(len(images)):
            assert apart(mixed[index], static_output(model, images[index : index + 1], used, index)[0]) < EVAL


def record(dynamic: nn.Module, images: Tensor) -> tuple[dict[str, list[Any]], Tensor]:
    """For each dynamic conv and each of its calls, the conv and the mixture."""
    used: dict[str, list[Any]] = {}
    handles = []
    for name, module in dynamic.named_modules():
        if isinstance(module, dyconvert.DynamicConv):

            def hook(conv: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                used.setdefault(name, []).append((conv, mixture_for(conv, args[0])))

            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    output = dynamic(images)
    for handle in handles:
        handle.remove()
    return used, output


def static_output(model: nn.Module, image: Tensor, used: dict[str, list[Any]], index: int) -> Tensor:
    """The static model's output for one image, whose convs have the kernels that its coefficients mix."""
    handles = []
    for name, calls in used.items():
        left = iter(calls)

        def hook(conv: nn.Module, args: Any, output: Tensor, left: Any = left) -> Tensor:
            dynamic, mixture = next(left)
            coefficients = mixture.coefficients()
            weights = {}
            for key, bank in (("weight", dynamic.weight), ("bias", dynamic.bias)):
                if bank is not None:
                    experts = bank.unflatten(0, (dynamic.g, -1))
                    eta = coefficients[index].view(*coefficients.shape[1:], *[1] * (bank.dim() - 1))
                    weights[key] = (eta * experts).sum(0)
            if mixture.inputs is not None:
                inputs = (
                    mixture.inputs[index].view(conv.groups, -1).repeat_interleave(conv.out_channels // conv.groups, 0)
                )
                weights["weight"] *= inputs.view(*inputs.shape, *[1] * len(conv.kernel_size))
            if mixture.positions is not None:
                weights["weight"] *= mixture.positions[index].view(conv.kernel_size)
            return conv._conv_forward(args[0], weights["weight"], weights.get("bias"))

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    try:
        return model(image)
    finally:
        for handle in handles:
            handle.remove()
