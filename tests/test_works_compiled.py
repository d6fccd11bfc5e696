"""A converted model under torch.compile: one graph, for any batch size."""

import copy
import shutil
from typing import Any

import pytest
import torch
import zoo
from nets import FlatNet, ResidualNet, image, seeded, trained
from test_works_under import EXACT, apart, assert_same, gradients
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from dyconvert.nn import DynamicConv2d, native_library


@pytest.fixture
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# More convs, and so half a minute each to compile twice.
LONGER = ("mobilenet_v3_small", "shufflenet_v2_x0_5", "densenet121", "googlenet")


def check_compiled(compiled: Any, counter: CompileCounter, calls: Any) -> None:
    """Equal for every batch, and compiled at most once for the first batch size and once more for any."""
    counts = []
    for batch in (2, 3, 5, 7, 4):
        calls(compiled, batch)
        counts.append(counter.frame_count)
    assert counts[0] > 0
    assert counts[1:] == [counts[1]] * 4, "compiled again for another batch size"


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(("method", "training"), [("dynet", True), ("dynet", False), ("dyconv", False)])
def test_compiling_a_block(method: str, training: bool) -> None:
    block = trained(seeded(ResidualNet).double(), method=method).layer1[1].train(training)

    def call(compiled: Any, batch: int) -> None:
        x = torch.randn(batch, 8, 6, 6, dtype=torch.float64)
        assert apart(compiled(x), block(x)) < EXACT

    counter = CompileCounter()
    check_compiled(torch.compile(copy.deepcopy(block), backend=counter, fullgraph=True), counter, call)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", ["resnet18", *(pytest.param(n, marks=pytest.mark.sweep) for n in LONGER)])
def test_compiling_a_classifier(name: str) -> None:
    dynamic = trained(zoo.build(name).double(), g=2)

    def call(compiled: Any, batch: int) -> None:
        images = zoo.images(name, batch, torch.float64)
        with torch.no_grad():
            assert apart(compiled(images), dynamic(images)) < EXACT

    counter = CompileCounter()
    check_compiled(torch.compile(dynamic, backend=counter, fullgraph=True), counter, call)


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiling_a_training_step() -> None:
    dynamic = trained(seeded(FlatNet).double(), g=2, example=image(dtype=torch.float64))

    def call(compiled: Any, batch: int) -> None:
        x = image(batch, dtype=torch.float64)
        assert_same(gradients(dynamic, compiled(x)), gradients(dynamic, dynamic(x)))

    counter = CompileCounterWithBackend("aot_eager")
    check_compiled(torch.compile(dynamic, backend=counter, fullgraph=True), counter, call)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_compiling_with_inductor(memory_format: torch.memory_format) -> None:
    dynamic = trained(seeded(FlatNet), g=2, example=image()).to(memory_format=memory_format)
    compiled = torch.compile(dynamic, fullgraph=True)
    for batch in (1, 2, 5):  # a single image has a way of its own
        x = image(batch).contiguous(memory_format=memory_format)
        # float32, with operations fused in another order.
        assert apart(compiled(x), dynamic(x)) < 1e-4


def operator_calls(per: str, training: bool, memory_format: torch.memory_format) -> Any:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, eta, shift = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((3, 8, 9, 7), (2 * 6, 8, 3, 3), (2 * 6,), (3, 2, 6 if per == "channel" else 1), (6,))
    )
    x = x.contiguous(memory_format=memory_format)
    geometry = ([1, 2], [1, 1], [1, 1], 1)
    if training:  # bias and shift are then left to autograd
        return (
            x.requires_grad_(),
            weight.requires_grad_(),
            None,
            eta.requires_grad_(),
            None,
            *geometry,
            None,
            True,
        )
    return (x, weight, bias, eta, None, *geometry, shift, False)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("per", ["layer", "channel"])
def test_the_operator_is_what_it_tells_the_compiler(
    per: str, training: bool, memory_format: torch.memory_format
) -> None:
    torch.library.opcheck(torch.ops.dyconvert.dynamic_conv.default, operator_calls(per, training, memory_format))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.skipif(native_library.library() is None, reason="the compiled kernels aren't built")
def test_compiled_kernels_are_one_operator_to_the_compiler() -> None:
    dynamic = trained(seeded(FlatNet), g=2, example=image())
    targets = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        targets.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    torch.compile(dynamic, backend=backend, fullgraph=True)(image(2))
    convs = sum(isinstance(module, DynamicConv2d) for module in dynamic.modules())
    assert sum("dyconvert.dynamic_conv" in str(target) for target in targets) == convs > 0
