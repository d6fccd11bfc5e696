"""Export of users' models: attributes and hooks of convs, outputs of any structure, names of any kind."""

import dataclasses
from typing import NamedTuple

import pytest
import torch
from nets import seeded
from test_export import AGREES, apart, images, onnx_runner, session
from torch import nn
from varied import randomised

import dyconvert
from dyconvert.exporting.export import export_onnx, export_torch
from dyconvert.exporting.exported import ExportError


class _Users(nn.Module):
    """As YOLO's models are: the layers say where their input comes from."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)])
        for index, layer in enumerate(self.layers):
            layer.f = -1 if index < 2 else 0
        self.layers[0].register_forward_hook(lambda module, args, output: output * 2)
        self.layers[1].register_forward_pre_hook(lambda module, args: (args[0] + 1,))

    def forward(self, x):
        x = self.stem(x)
        kept = []
        for layer in self.layers:
            x = layer(x if layer.f == -1 else kept[layer.f]).to(layer.weight.dtype)
            x = x / layer.in_channels if layer.stride == (1, 1) else x
            kept.append(x)
        return x


@pytest.mark.parametrize("batch", [None, 2])
def test_attributes_and_hooks_of_convs_survive(batch, tmp_path):
    model = randomised(dyconvert.convert(seeded(_Users), scope="layer"))
    done = export_onnx(model, tmp_path / "m.onnx", images(2), dynamic_batch=batch is None)
    assert apart(model, onnx_runner(done.file), images(2, seed=5)) < AGREES


class _Returns(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.kind = kind

    def forward(self, x):
        y = self.stem(x)
        z = self.conv(y)
        return {
            "dict": {"out": z, "aux": y, "scale": 3.0},
            "dataclass": _Structure(z, [y, y.mean()]),
            "slots": _Slots(z, y),
            "named tuple": _Tuple(z, y),
            "nested": {"a": [{"b": z}], "a_0_b": y},
            "the input's name": {"input": z},
            "tensor": z,
            "list": [z, y],
        }[self.kind]


@dataclasses.dataclass
class _Structure:
    logits: torch.Tensor
    aux: list


class _Slots:
    __slots__ = ("boxes", "scores")

    def __init__(self, boxes, scores):
        self.boxes, self.scores = boxes, scores


class _Tuple(NamedTuple):
    mean: torch.Tensor
    std: torch.Tensor


NAMES = {
    "dict": ["out", "aux"],
    "dataclass": ["logits", "aux_0", "aux_1"],
    "slots": ["boxes", "scores"],
    "named tuple": ["mean", "std"],
    "nested": ["a_0_b", "a_0_b_out"],
    "the input's name": ["input_out"],
    "tensor": ["output"],
    "list": ["output_0", "output_1"],
}


@pytest.mark.parametrize("kind", NAMES)
def test_outputs_are_called_as_the_fields(kind, tmp_path):
    model = seeded(lambda: _Returns(kind))
    export_onnx(model, tmp_path / "m.onnx", images(2))
    assert [each.name for each in session(tmp_path / "m.onnx").get_outputs()] == NAMES[kind]


def test_torch_returns_a_dict_for_an_object_it_does_not_know(tmp_path):
    model = seeded(lambda: _Returns("dataclass"))
    done = export_torch(model, tmp_path / "m.pt2", images(2))
    assert done.difference < AGREES
    assert list(torch.export.load(tmp_path / "m.pt2").module()(images(3))) == NAMES["dataclass"]


class _Cuts(nn.Module):
    """Its batch into parts: each by its own conv, or all by one."""

    def __init__(self, cut):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.convs = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)])
        self.cut = cut

    def forward(self, x):
        a, b = self.cut(self.stem(x))
        return torch.cat([self.convs[0](a), self.convs[1](b)])


CUTS = {
    "method": lambda x: x.chunk(2),
    "function": lambda x: torch.chunk(input=x, chunks=2, dim=0),
    "negative dimension": lambda x: x.chunk(2, -4),
    "split": lambda x: x.split(x.shape[0] - x.shape[0] // 2),
    "channels, then batch": lambda x: torch.cat(x.chunk(4, 1), 1).chunk(2, dim=0),
}


@pytest.mark.parametrize("cut", CUTS)
def test_a_batch_of_any_size_is_cut(cut, tmp_path):
    model = randomised(dyconvert.convert(seeded(lambda: _Cuts(CUTS[cut])), example=images(4)))
    done = export_onnx(model, tmp_path / "m.onnx", images(4))
    run = onnx_runner(done.file)
    for n in (2, 3, 4, 5, 8):
        assert apart(model, run, images(n, seed=n)) < AGREES


class _Keyed(nn.Module):
    def __init__(self, key):
        super().__init__()
        self.convs = nn.ModuleDict({"first": nn.Conv2d(3, 4, 3), key: nn.Conv2d(4, 4, 3)})
        self.key = key

    def forward(self, x):
        return self.convs[self.key](self.convs["first"](x))


@pytest.mark.parametrize("key", ["in", "class", "it's", 'a "b"'])
@pytest.mark.parametrize("export", [export_onnx, export_torch])
def test_a_key_that_is_no_name_is_named_or_written(key, export, tmp_path):
    model = dyconvert.convert(seeded(lambda: _Keyed(key)), method="condconv", example=images(2))
    said = ""
    try:
        export(model, tmp_path / "m", images(2))  # compares what it wrote with the model
    except ExportError as error:
        said = str(error)
    assert (tmp_path / "m").exists() or ("Rename that key" in said and repr(f"convs.{key}") in said)
