"""Each use of torch-pruning's insides, in the version that is installed: what the bridge says holds there."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("torch_pruning")

from dyconvert.narrowing import torch_pruning_bridge as bridge


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(12, 6, 1)
        self.gate = nn.Conv2d(8, 1, 1)
        self.scale = nn.Parameter(torch.ones(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.a(x)) * self.scale
        return self.b(F.pad(y * self.gate(y).sigmoid(), (0, 0, 0, 0, 1, 3)))


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def traced(model: Net, mend=lambda nodes: None, training: bool = False) -> bridge.DependencyGraph:
    return bridge.dependency_graph(model, (torch.randn(2, 3, 8, 8),), training, mend, [])


def by_name(graph: bridge.DependencyGraph, operator: str) -> bridge.Node:
    return next(n for n in bridge.nodes(graph) if bridge.is_operator(n) and operator in n.grad_fn.name())


def node_of(graph: bridge.DependencyGraph, module: nn.Module) -> bridge.Node:
    return next(node for node in bridge.nodes(graph) if node.module is module)


def test_kinds_of_nodes():
    model = Net()
    graph = traced(model)
    assert {bridge.kind(node) for node in bridge.nodes(graph)} >= {"CONV", "BN", "ELEMENTWISE", "PARAMETER"}
    assert not bridge.is_operator(node_of(graph, model.a))
    assert bridge.is_operator(by_name(graph, "Mul"))
    assert not any(bridge.is_output(node) for node in bridge.nodes(graph))
    flat = nn.Sequential(model.a, nn.Flatten(), nn.Linear(512, 2), nn.ReLU())
    kinds = [bridge.kind(node) for node in bridge.nodes(traced(flat)) if bridge.is_operator(node)]
    assert "RESHAPE" in kinds
    assert {"OUTPUT"} == {
        bridge.kind(node) for node in bridge.nodes(traced(nn.Sequential(model.a, Twice()))) if bridge.is_output(node)
    }


def test_it_traces_the_mode_that_is_asked_for():
    seen = []
    model = Net()
    model.register_forward_hook(lambda module, *_: seen.append(module.training))
    for training in (True, False):
        traced(model, training=training)
    assert seen == [True, False]
    assert "eval" not in vars(model)


def test_parameters_and_cutters():
    model = Net()
    graph = traced(model)
    assert bridge.parameter_dims(graph) == {id(model.scale): 1}
    cutter = bridge.cutter(graph, model.a)
    assert (cutter.get_out_channels(model.a), cutter.get_in_channels(model.a)) == (8, 3)
    cutter.prune_out_channels(model.a, [0, 7])
    bridge.cutter(graph, model.b).prune_in_channels(model.b, [1])
    assert (model.a.weight.shape[0], model.a.out_channels) == (6, 6)
    assert (model.b.weight.shape[1], model.b.in_channels) == (11, 11)


def test_coupled_channels_and_what_mends_them():
    model = Net()

    def mend(nodes: list[bridge.Node]) -> None:
        for node in nodes:
            if bridge.is_operator(node) and "Mul" in node.grad_fn.name():
                for source in list(node.inputs):
                    if bridge.is_operator(source) and "Sigmoid" in source.grad_fn.name():
                        bridge.part(source, node)
                        assert source not in node.inputs
                        assert node not in source.outputs
            if bridge.kind(node) == "BN":
                assert node.inputs

    graph = traced(model, mend)
    pad = by_name(graph, "ConstantPad")
    (source,) = pad.inputs
    assert bridge.channels_out(graph, node_of(graph, model.norm)) == 8
    bridge.shift_channels(pad, source, before=1, size=8)
    coupled = list(bridge.coupled(graph, model.a, [2, 5]))
    assert (coupled[0].node.module, coupled[0].side, coupled[0].channels) == (model.a, "out", [2, 5])
    of = {id(entry.node.module): entry for entry in coupled}
    assert (of[id(model.norm)].side, of[id(model.norm)].channels) == ("out", [2, 5])
    assert (of[id(model.b)].side, of[id(model.b)].channels, of[id(model.b)].roots) == ("in", [3, 6], [2, 5])
    assert of[id(model.gate)].side == "in"
    assert of[id(model.scale)].channels == [2, 5]


def test_a_node_is_treated_as_elementwise():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(2), nn.Linear(64, 4))

    def mend(nodes: list[bridge.Node]) -> None:
        for node in nodes:
            if bridge.kind(node) == "RESHAPE":
                bridge.treat_as_elementwise(node)

    assert not any(bridge.kind(node) == "RESHAPE" for node in bridge.nodes(traced(model, mend)))


def test_its_version_is_bounded():
    assert '"torch-pruning>=1.6,<1.7"' in (Path(__file__).parents[1] / "pyproject.toml").read_text()


def test_only_the_bridge_imports_it():
    package = Path(bridge.__file__).parents[1]
    imports = re.compile(r"^\s*(from|import) torch_pruning\b", re.MULTILINE)
    users = [file.name for file in package.rglob("*.py") if imports.search(file.read_text())]
    assert users == ["torch_pruning_bridge.py"]
