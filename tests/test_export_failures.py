"""Exports that fail: they name the node and the workaround, and leave no file."""

import os
import runpy
import subprocess
import sys

import pytest
import torch
import torchvision
from nets import seeded
from test_export import AGREES, apart, images, onnx_runner, onnxruntime, session
from torch import Tensor, nn
from varied import randomised

import dyconvert
from dyconvert.exporting import exported
from dyconvert.exporting.export import export_onnx, export_torch
from dyconvert.exporting.exported import ExportError


class _DecidesByValue(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.conv = nn.Conv2d(8, 8, 3)

    def forward(self, x):
        x = self.conv(self.stem(x))
        if x.sum() > 0:
            return x
        return -x


class _WithoutTranslation(_DecidesByValue):
    def forward(self, x):
        return torch.linalg.eigvalsh(self.conv(self.stem(x)).flatten(2) @ self.stem(x).flatten(2)[..., :144].mT)


class _FixedBatch(_DecidesByValue):
    def forward(self, x):
        return self.conv(self.stem(x)).reshape(2, -1)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (_DecidesByValue, r"test_export_failures\.py, line \d+ \(`if x\.sum\(\) > 0:`\).*decides by a tensor's values"),
        (_WithoutTranslation, r"operator aten.*eigh.*--to torch"),
        (_FixedBatch, r"dynamic_batch=False"),
    ],
)
def test_failures_name_the_node_and_the_workaround(build, said, tmp_path):
    model = dyconvert.convert(seeded(build), method="condconv", example=images(2))
    file = tmp_path / "m.onnx"
    file.write_text("what was there")
    with pytest.raises(ExportError, match=f"(?s){said}"):
        export_onnx(model, file, images(2))
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert file.read_text() == "what was there"


DECIDES = """
import torch

class Net(torch.nn.Sequential):
    def forward(self, x):
        x = super().forward(x)
        return x if x.sum() > 0 else -x
"""


@pytest.mark.parametrize("folder", ["dyconvert", "torch/nn", "onnx_models", "lib/python3.12/mine", "lib/python3/onnx"])
def test_the_line_is_found_whatever_the_folder_is_called(folder, tmp_path):
    file = tmp_path / folder / "net.py"
    file.parent.mkdir(parents=True)
    file.write_text(DECIDES)
    net = runpy.run_path(str(file))["Net"](nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    with pytest.raises(ExportError, match=r"in net\.py, line 7 \(`return x if x\.sum\(\) > 0 else -x`\)"):
        export_onnx(dyconvert.convert(net.eval(), example=images(2)), tmp_path / "m.onnx", images(2))


def test_files_of_the_libraries_are_known():
    files = [torch.nn.Module.__init__, onnxruntime.InferenceSession.__init__, dyconvert.convert, subprocess.run]
    assert all(exported.is_of_libraries(each.__code__.co_filename) for each in files)
    # Packages stand within the standard library's folder, and are none of it.
    assert not exported.is_of_libraries(torchvision.models.ResNet.__init__.__code__.co_filename)


def test_a_file_that_computes_something_else_is_not_written(net, tmp_path, monkeypatch):
    monkeypatch.setattr(exported, "TOLERANCE", 0.0)
    model = randomised(dyconvert.convert(net))
    for export, name in ((export_onnx, "m.onnx"), (export_torch, "m.pt2")):
        if export is export_torch:
            monkeypatch.setattr(exported, "_difference", lambda *_: 1.0)
        with pytest.raises(ExportError, match=r"something else.*Nothing was written"):
            export(model, tmp_path / name, images(2))
    assert not list(tmp_path.iterdir())


def test_overflow_in_float16_is_said(net, tmp_path):
    with torch.no_grad():
        net.stem.weight *= 1e6
    with pytest.raises(ExportError, match="don't fit into float16"):
        export_onnx(dyconvert.convert(net), tmp_path / "m.onnx", images(2), fp16=True)


def test_large_models_keep_their_weights_beside_the_file(net, tmp_path, monkeypatch):
    from dyconvert.exporting import export

    model = randomised(dyconvert.convert(net))
    monkeypatch.setattr(export, "LARGEST_FILE", 0)
    done = export_onnx(model, tmp_path / "new" / "m.onnx", images(2))
    assert sorted(p.name for p in done.file.parent.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert done.bytes == sum(p.stat().st_size for p in done.file.parent.iterdir())
    assert apart(model, onnx_runner(done.file), images(3)) < AGREES
    monkeypatch.undo()
    export_onnx(model, done.file, images(2))
    assert [p.name for p in done.file.parent.iterdir()] == ["m.onnx"]


class Conditioned(nn.Module):
    """Images, a step for each, and tokens, as a diffusion model takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.steps, self.words = nn.Embedding(10, 8), nn.Embedding(20, 8)

    def forward(self, x: Tensor, step: Tensor, tokens: Tensor) -> Tensor:
        scale = self.steps(step) + self.words(tokens).mean(1)
        return self.conv(self.stem(x).relu() * scale[:, :, None, None])


def test_inputs_that_are_no_maps(tmp_path):
    def given(batch: int) -> tuple[Tensor, ...]:
        return images(batch), torch.arange(batch), torch.arange(5 * batch).view(batch, 5) % 20

    model = randomised(dyconvert.convert(seeded(Conditioned), example=given(2)))
    done = export_onnx(model, tmp_path / "m.onnx", given(2))
    run = session(done.file)
    feeds = dict(zip([each.name for each in run.get_inputs()], (t.numpy() for t in given(3)), strict=True))
    with torch.no_grad():
        expected = model(*given(3))
    assert (torch.from_numpy(run.run(None, feeds)[0]) - expected).abs().max() < AGREES * expected.abs().max()
    export_torch(model, tmp_path / "m.pt2", given(2))


@pytest.mark.parametrize("example", [(), ([torch.zeros(3, 16, 16)],), torch.zeros(5), (torch.zeros(2, 3, 8, 8), 4)])
def test_other_inputs_are_refused(net, example, tmp_path):
    with pytest.raises(ExportError, match=r"\[N, C, \*spatial\]"):
        export_onnx(dyconvert.convert(net), tmp_path / "m.onnx", example)


def test_an_absent_extra_is_named(net, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ExportError, match=r"pip install '.*\[onnx\]'"):
        export_onnx(dyconvert.convert(net), tmp_path / "m.onnx", images(2))


def test_without_onnxruntime_it_is_not_checked(net, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    done = export_onnx(dyconvert.convert(net), tmp_path / "m.onnx", images(2))
    assert (done.difference, done.checked) == (None, ())


def test_the_package_does_not_import_onnx():
    code = "import sys, dyconvert.exporting.export, dyconvert.cli; print([m for m in sys.modules if 'onnx' == m[:4]])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.strip() == "[]"


def test_the_given_model_stays_as_it_is(net, tmp_path):
    model = dyconvert.convert(net).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    export_onnx(model, tmp_path / "m.onnx", images(2))
    assert model.training
    assert model.layer1[0].conv1.weight.requires_grad
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
