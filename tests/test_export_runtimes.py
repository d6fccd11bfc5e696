"""Export to OpenVINO and to ExecuTorch: what their runtimes compute, in what form, and what becomes of failures.

Neither is among the test extra. Where one is absent its tests are skipped; to run them:

    pip install '.[test,openvino,executorch]' && pytest tests/test_export_runtimes.py

If executorch needs another torch, in an environment of its own. `-m "sweep or not sweep"` adds the whole models.
"""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from nets import FlatNet, ResidualNet, seeded
from test_export import AGREES, AGREES_FP16, _Kinds, apart, images
from test_export_failures import _DecidesByValue
from torch import Tensor, nn
from varied import randomised, with_statistics

import dyconvert
from dyconvert import export_executorch, export_openvino
from dyconvert.exporting import executorch_conv
from dyconvert.exporting.exported import ExportError

needs_openvino = pytest.mark.skipif(not find_spec("openvino"), reason="needs dyconvert[openvino], which test hasn't")
needs_executorch = pytest.mark.skipif(
    not find_spec("executorch"), reason="needs dyconvert[executorch], which test hasn't"
)


def openvino_runner(file: Path) -> Callable[[Tensor], Tensor]:
    import openvino

    # OpenVINO computes in bfloat16 where the processor can; not to be compared at 1e-4.
    compiled = openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": openvino.Type.f32})
    return lambda x: torch.from_numpy(compiled(x.numpy())[0].copy())


def executorch_runner(file: Path) -> Callable[[Tensor], Tensor]:
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(file.read_bytes())
    method = program.load_method("forward")

    def run(x: Tensor) -> Tensor:
        assert program is not None  # the method reads its bytes, and doesn't keep them
        return method.execute([x.contiguous()])[0].clone()

    return run


RUNTIMES = [
    pytest.param(export_openvino, openvino_runner, "m.xml", marks=needs_openvino, id="openvino"),
    pytest.param(export_executorch, executorch_runner, "m.pte", marks=needs_executorch, id="executorch"),
]
runtimes = pytest.mark.parametrize(("export", "runner", "name"), RUNTIMES)


@runtimes
@pytest.mark.parametrize(("method", "batch"), [("dynet", None), ("condconv", 1), ("dyconv", 3)])
def test_every_kind_of_conv(export, runner, name, method, batch, tmp_path):
    model = randomised(dyconvert.convert(seeded(_Kinds), method=method, scope="layer"))
    done = export(model, tmp_path / name, images(batch or 2), dynamic_batch=batch is None)
    run = runner(done.file)
    for n in (1, 3, 8) if batch is None else (batch,):
        assert apart(model, run, images(n, seed=n)) < AGREES
    assert done.difference < AGREES
    assert done.bytes == sum(each.stat().st_size for each in tmp_path.iterdir())


@runtimes
def test_any_batch_and_any_size(export, runner, name, tmp_path):
    model = dyconvert.fuse(with_statistics(randomised(dyconvert.convert(seeded(ResidualNet)))))
    run = runner(export(model, tmp_path / name, images(1, size=(32, 32)), dynamic_size=True).file)
    for n, size in ((1, (16, 16)), (3, (24, 40)), (8, (17, 9))):
        assert apart(model, run, images(n, seed=n, size=size)) < AGREES
    # It mixes: the same images in another batch, but with others' coefficients, would be far off.
    x = images(4)
    assert apart(model, lambda x: run(x.flip(0)), x) > 100 * AGREES


@runtimes
def test_one_dimension(export, runner, name, tmp_path):
    model = randomised(dyconvert.convert(seeded(FlatNet, dims=1)))
    export(model, tmp_path / name, images(2, 1), dynamic_batch=False)
    assert apart(model, runner(tmp_path / name), images(2, 1)) < AGREES


@runtimes
def test_several_outputs_come_in_their_order(export, runner, name, tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x):
            y = self.conv(self.stem(x))
            return {"maps": y, "mean": y.mean((2, 3))}

    model = randomised(dyconvert.convert(seeded(Two)))
    done = export(model, tmp_path / name, images(2), dynamic_batch=False)
    assert done.difference < AGREES  # of both


@needs_openvino
def test_float16_halves_openvinos_weights(tmp_path):
    model = with_statistics(randomised(dyconvert.convert(seeded(ResidualNet))))
    export_openvino(model, tmp_path / "full.xml", images(2))
    export_openvino(model, tmp_path / "half.xml", images(2), fp16=True)
    full, half = ((tmp_path / name).stat().st_size for name in ("full.bin", "half.bin"))
    assert half < 0.6 * full
    assert apart(model, openvino_runner(tmp_path / "half.xml"), images(3)) < AGREES_FP16


@needs_executorch
def test_xnnpack_computes_all_that_is_heavy(tmp_path):
    """No conv is left to the portable loops: a dynamic one would be, in its own form."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    model = dyconvert.fuse(with_statistics(randomised(dyconvert.convert(seeded(ResidualNet)))))
    done = export_executorch(model, tmp_path / "m.pte", images(1), dynamic_batch=False)
    program = deserialize_pte_binary(done.file.read_bytes())
    plan = getattr(program, "program", program).execution_plan[0]
    portable = {operator.name for operator in plan.operators}
    assert not {name for name in portable if any(word in name for word in ("conv", "mm", "linear"))}, portable
    assert [delegate.id for delegate in plan.delegates] == ["XnnpackBackend"] * len(plan.delegates)


@pytest.mark.parametrize("method", list(dyconvert.METHODS))
def test_executorchs_forms_compute_the_same_in_torch(method):
    """What is written for XNNPACK, without its runtime."""
    from dyconvert.copying import skeleton
    from dyconvert.surgery.apply import replace_everywhere

    model = randomised(dyconvert.convert(seeded(_Kinds), method=method, scope="layer")).double()
    written = skeleton(model, lambda t: t)
    written = replace_everywhere(written, executorch_conv.prepared(written))
    kinds = {type(module) for module in written.modules()}
    assert executorch_conv.MixedMatrix in kinds
    # ODConv's factors of a kernel's positions multiply mixed kernels, of which mixed maps have none.
    assert (executorch_conv.MixedMaps in kinds) == ("positions" not in dyconvert.METHODS[method].axes)
    assert not any(isinstance(module, dyconvert.DynamicConv) for module in written.modules())
    for n in (1, 3):
        # float64, in another order of sums.
        assert apart(model, written, images(n).double()) < 1e-12


# ---- Failures ----


@runtimes
def test_failures_name_the_line_and_leave_what_was_there(export, runner, name, tmp_path):
    model = dyconvert.convert(seeded(_DecidesByValue), method="condconv", example=images(2))
    (tmp_path / name).write_text("what was there")
    with pytest.raises(ExportError, match=r"(?s)test_export_failures\.py, line \d+.*decides by a tensor's values"):
        export(model, tmp_path / name, images(2))
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(name, "what was there")]


@pytest.mark.parametrize(
    ("export", "package", "extra"),
    [(export_openvino, "openvino", "openvino"), (export_executorch, "executorch", "executorch")],
)
def test_an_absent_extra_is_named(net, export, package, extra, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ExportError, match=rf"needs {package}\. Run `pip install '.*\[{extra}\]'`"):
        export(dyconvert.convert(net), tmp_path / "m.xml", images(2))


def test_an_executorch_made_for_another_torch_is_said(net, tmp_path, monkeypatch):
    # Packages without what is imported from them, as after an extension that can't be loaded.
    for package in ("executorch", "executorch.backends", "executorch.exir", "executorch.runtime"):
        module = ModuleType(package)
        module.__spec__ = find_spec("dyconvert")
        monkeypatch.setitem(sys.modules, package, module)
    with pytest.raises(
        ExportError, match=rf"doesn't work with torch {torch.__version__[:4]}.*environment of their own"
    ):
        export_executorch(dyconvert.convert(net), tmp_path / "m.pte", images(2))
    assert not list(tmp_path.iterdir())


@needs_openvino
def test_an_openvino_file_ends_in_xml(net, tmp_path):
    with pytest.raises(ExportError, match=r"Name it model\.xml"):
        export_openvino(dyconvert.convert(net), tmp_path / "model.bin", images(2))


# ---- The command ----


@pytest.mark.parametrize(
    ("target", "runner", "suffix", "said"),
    [
        pytest.param("openvino", openvino_runner, ".xml", "any number of images", marks=needs_openvino),
        pytest.param("executorch", executorch_runner, ".pte", "up to 8 images", marks=needs_executorch),
    ],
)
def test_cli(cli, target, runner, suffix, said, tmp_path):
    assert cli("convert", "digits-resnet8", "-o", "saved").code == 0
    done = cli("export", "saved", "--to", target)
    assert done.code == 0, done.said
    assert f"wrote saved{suffix}: " in done.said
    assert f"{said}, 1x8x8" in done.said
    model = dyconvert.load(tmp_path / "saved")
    digits = dyconvert.builtin.load_digits_test()[0][:5]
    assert apart(model, runner(tmp_path / f"saved{suffix}"), digits) < AGREES


def test_cli_says_what_is_missing(cli, monkeypatch):
    assert cli("convert", "digits-resnet8", "-o", "saved").code == 0
    done = cli("export", "saved", "--to", "executorch", "--fp16")
    assert (done.code, "--fp16 is for ONNX and OpenVINO" in done.said) == (2, True)
    for target in ("openvino", "executorch"):
        if not find_spec(target):
            done = cli("export", "saved", "--to", target)
            assert (done.code, f"[{target}]" in done.said) == (2, True)


# ---- Whole models ----


@runtimes
@pytest.mark.sweep
@pytest.mark.parametrize("batch", [1, None])
def test_narrowed_mobilenet_v2(export, runner, name, batch, tmp_path):
    pytest.importorskip("torch_pruning", reason="needs dyconvert[narrow]")
    from dyconvert import models

    x = images(16, size=(64, 64))
    static = with_statistics(models.create("mobilenet_v2", "none")[0].eval(), x)
    model = dyconvert.fuse(randomised(dyconvert.narrow(static, g=6, flops=0.43, example=x[:1])))
    done = export(model, tmp_path / name, x[: batch or 2], dynamic_batch=batch is None)
    for n in (1, 3) if batch is None else (1,):
        assert apart(model, runner(done.file), x[:n]) < AGREES


@runtimes
@pytest.mark.sweep
@pytest.mark.parametrize("width", [None, 0.5])
def test_cifar_resnet20(export, runner, name, width, data_dir, tmp_path):
    from dyconvert import models

    weights = str(data_dir / "cifar10_resnets" / "resnet20-12fca82f.th")
    static, _ = models.create("cifar-resnet20", weights)
    x = images(4, size=(32, 32))
    model = dyconvert.convert(static) if width is None else dyconvert.narrow(static, width=width, example=x[:1])
    model = dyconvert.fuse(randomised(model, std=0.05))
    done = export(model, tmp_path / name, x[:1], dynamic_batch=False)
    assert apart(model, runner(done.file), x[3:]) < AGREES
