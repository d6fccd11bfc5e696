"""dyconvert export"""

import time
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from dyconvert.cli.options import Compress, Factory, Json, Size, Trust, check_compress, check_free, name_of, parse_size
from dyconvert.cli.progress import progress
from dyconvert.console import count, out, write_json
from dyconvert.errors import DyconvertError
from dyconvert.installation import install_command


class Format(str, Enum):
    """The values of `--to`."""

    onnx = "onnx"
    torch = "torch"
    openvino = "openvino"
    executorch = "executorch"


_SUFFIX = {Format.onnx: ".onnx", Format.torch: ".pt2", Format.openvino: ".xml", Format.executorch: ".pte"}
# The runtime that checks the file.
_RUNNER = {
    Format.onnx: "onnxruntime",
    Format.torch: "the loaded program",
    Format.openvino: "OpenVINO",
    Format.executorch: "ExecuTorch's runtime",
}
# Formats whose weights can be float16.
_HALF = (Format.onnx, Format.openvino)


def export(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A model saved by dyconvert.")],
    to: Annotated[Format, typer.Option("--to", help="torch: torch.export's .pt2.")] = Format.onnx,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="By default DIR.onnx, .pt2, .xml or .pte.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, help="A fixed number of images; any number by default.")
    ] = None,
    dynamic_size: Annotated[
        bool, typer.Option("--dynamic-size", help="Any spatial size that the model takes.")
    ] = False,
    fp16: Annotated[bool, typer.Option("--fp16", help="Weights in float16 (ONNX, OpenVINO).")] = False,
    fuse: Annotated[bool, typer.Option("--fuse/--no-fuse", help="Fold batch norms into the convs first.")] = True,
    compress: Compress = None,
    input_size: Size = None,
    trust_code: Trust = False,
    factory: Factory = None,
    as_json: Json = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the output file.")] = False,
    device: str | None = None,
) -> None:
    """Write a saved model as one file for a runtime, and check that it computes the same there."""
    if fp16 and to not in _HALF:
        raise DyconvertError(
            f"--fp16 is for ONNX and OpenVINO, and {to.value} isn't. For torch, convert the loaded model: model.half()."
        )
    check_compress(compress)
    size = parse_size(input_size)
    file = output or Path(name_of(directory) + _SUFFIX[to])
    check_free(file, force)

    from dyconvert.cli.opening import loaded
    from dyconvert.exporting.executorch_pte import LARGEST_BATCH, LARGEST_SIZE, export_executorch
    from dyconvert.exporting.export import export_onnx, export_torch
    from dyconvert.exporting.openvino_ir import export_openvino
    from dyconvert.marks import compression_of
    from dyconvert.surgery.compress import compress as compress_model
    from dyconvert.surgery.fuse import fuse as fuse_model

    started = time.perf_counter()
    with progress(f"exporting {directory}"):
        model, _, example = loaded(directory, trust_code, size, batch or 2, device, factory)
        if fuse:
            model = fuse_model(model, example)
        if compress is not None:
            model = compress_model(model, compress, example)
        sizes = (batch is None, dynamic_size)
        if to is Format.onnx:
            done = export_onnx(model, file, example, *sizes, fp16)
        elif to is Format.openvino:
            done = export_openvino(model, file, example, *sizes, fp16)
        elif to is Format.executorch:
            done = export_executorch(model, file, example, *sizes)
        else:
            done = export_torch(model, file, example, *sizes)
    seconds = time.perf_counter() - started
    if as_json:
        result = {
            "file": str(done.file),
            "bytes": done.bytes,
            "opset": done.opset,
            "difference": done.difference,
            "compression": (compression := compression_of(model)) and compression.model_dump(),
            "checked": done.checked,
            "seconds": seconds,
        }
        write_json(result)
        return
    planned = to is Format.executorch  # whose memory is planned for the largest input
    batches = f"{batch} image{'s' if batch > 1 else ''}" if batch else "any number of images"
    if planned and not batch:
        batches = f"up to {LARGEST_BATCH} images"
    pixels = "x".join(map(str, example[0].shape[1:]))
    if dynamic_size:
        pixels = f"up to {LARGEST_SIZE} times {pixels}" if planned else "any size"
    opset = f", opset {done.opset}" if done.opset else ""
    out.print(f"wrote {done.file}: {count(done.bytes)}B{opset}, in {seconds:.1f} s", soft_wrap=True)
    computes = ", and computes in float16" if fp16 and to is Format.onnx else ""
    dtype = str(example[0].dtype).removeprefix("torch.")
    out.print(f"takes {batches}, {pixels}, in {dtype}{computes}")
    if compression := compression_of(model):
        out.print(str(compression))
    if done.difference is None:
        out.print(f"not checked: onnxruntime isn't installed ({install_command('onnx')})", soft_wrap=True)
    else:
        shapes = ", ".join("x".join(map(str, shape)) for shape in done.checked)
        out.print(f"checked in {_RUNNER[to]} at {shapes}: largest difference {done.difference:.1e} relative")
