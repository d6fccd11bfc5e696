"""Export to OpenVINO's IR, an `.xml` with its weights in a `.bin` beside it, checked in OpenVINO against torch.

It goes through ONNX. OpenVINO's convs, depthwise ones too, take a kernel that varies at the speed of a constant one,
but its batched MatMul of short rows is slow, so kernels are mixed term by term.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dyconvert.errors import ExportError, brief
from dyconvert.exporting.export import example_and_axes, on_cpu, onnx_program_of, require, save_onnx
from dyconvert.exporting.exported import Exported, difference_of_program, written
from dyconvert.paths import as_path


def export_openvino(
    model: nn.Module,
    file: str | Path,
    example: Any,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    fp16: bool = False,
) -> Exported:
    """Write a model as OpenVINO's IR, and compare it with torch by running it in OpenVINO.

    Args:
        model, example, dynamic_batch, dynamic_size: as in :func:`~dyconvert.export_onnx`.
        file: ends with `.xml`; the weights go to the file of the same name that ends with `.bin`.
        fp16: weights in float16, half the size. The device chooses what it computes in, whatever the weights are.

    Returns:
        What was written, and how far OpenVINO's outputs are from torch's where it computes in float32, at the inputs
        that :func:`~dyconvert.export_onnx` checks.

    Raises:
        ExportError: openvino, onnx or onnxscript isn't installed; the model can't be exported, and which operator or
            node prevents it; the file can't be written, or computes something else.
    """
    file = as_path(file, ExportError)
    require("OpenVINO", "openvino", "openvino", "onnx", "onnxscript")
    import openvino

    if file.suffix != ".xml":
        raise ExportError(f"{file} doesn't end in .xml, which OpenVINO's files do. Name it {file.stem}.xml.")
    arguments, axes = example_and_axes(model, example, dynamic_batch, dynamic_size)
    reference = on_cpu(model)
    onnx_program, inputs = onnx_program_of(model, reference, arguments, axes, by_terms=True)
    with tempfile.TemporaryDirectory() as folder:
        save_onnx(onnx_program, Path(folder) / "model.onnx")
        try:
            converted = openvino.convert_model(Path(folder) / "model.onnx")
        except Exception as error:
            raise ExportError(
                f"OpenVINO {openvino.__version__} can't read the model's graph ({brief(error)}). Nothing was written. "
                "Try a fixed batch, `dynamic_batch=False`, or a newer OpenVINO."
            ) from error
        with written(file) as part:
            openvino.save_model(converted, part, compress_to_fp16=fp16)
            difference = difference_of_program(reference, _runner(part), inputs, fp16)
            size = sum(each.stat().st_size for each in part.parent.iterdir())
    return Exported(file, size, None, difference, tuple(tuple(each[0].shape) for each in inputs))


def _runner(file: Path) -> Callable[..., list[Tensor]]:
    import openvino

    core = openvino.Core()
    # OpenVINO would compute in bfloat16 where the processor can; that would hide whether the file is right.
    compiled = core.compile_model(core.read_model(file), "CPU", {"INFERENCE_PRECISION_HINT": openvino.Type.f32})

    def run(*arguments: Tensor) -> list[Tensor]:
        results = compiled([argument.contiguous().numpy() for argument in arguments])
        return [torch.from_numpy(results[index].copy()) for index in range(len(compiled.outputs))]

    return run
