"""Export to ExecuTorch's `.pte`, computed by its XNNPACK backend, checked in its runtime against torch."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dyconvert.copying import skeleton
from dyconvert.errors import ExportError, brief
from dyconvert.exporting.export import example_and_axes, on_cpu, program_of, require, what_it_returns
from dyconvert.exporting.exported import (
    Exported,
    check_inputs,
    difference_of_program,
    explained,
    quiet,
    taken,
    written,
)
from dyconvert.exporting.named_outputs import NamedOutputs, output_names
from dyconvert.paths import as_path
from dyconvert.surgery.apply import replace_everywhere

# ExecuTorch plans its memory for the largest input.
LARGEST_BATCH = 8
LARGEST_SIZE = 2  # times the example's


def export_executorch(
    model: nn.Module, file: str | Path, example: Any, dynamic_batch: bool = True, dynamic_size: bool = False
) -> Exported:
    """Write a model as ExecuTorch's `.pte`, and compare it with torch by running it in ExecuTorch's runtime.

    What XNNPACK doesn't have is computed by ExecuTorch's portable operators.

    Args:
        model, example: as in :func:`~dyconvert.export_onnx`.
        file: replaced if it exists, in one step.
        dynamic_batch: the file takes up to 8 images, or the example's number if that is larger: its memory is planned
            for the largest input. False: the example's, which is faster: XNNPACK has no reshapes or slices of sizes
            that vary.
        dynamic_size: the file takes sizes up to twice the example's. False: the example's.

    Returns:
        What was written, and how far its outputs are from torch's, at the inputs that :func:`~dyconvert.export_onnx`
        checks.

    Raises:
        ExportError: executorch isn't installed, or is made for another torch; the model can't be exported, and which
            operator or node prevents it; the file can't be written, or computes something else.
    """
    file = as_path(file, ExportError)
    require("ExecuTorch", "executorch", "executorch")
    from dyconvert.exporting.executorch_conv import prepared

    to_edge, partitioner, runtime = _executorch()
    arguments, axes = example_and_axes(model, example, dynamic_batch, dynamic_size)
    reference = on_cpu(model)
    exported = skeleton(reference, lambda t: t)  # shares all tensors
    exported = replace_everywhere(exported, prepared(exported))
    exported = NamedOutputs(exported, output_names(what_it_returns(reference, arguments)))
    program = program_of(exported, reference, arguments, (axes,), _largest(arguments, axes))
    with explained("The graph can't be written for ExecuTorch", reference), quiet(), _without_stderr():
        lowered = to_edge(program, partitioner=[partitioner()]).to_executorch()
    with written(file) as part:
        part.write_bytes(lowered.buffer)
        inputs = taken(reference, check_inputs(reference, arguments, axes))
        with _runner(runtime, part) as run:
            difference = difference_of_program(reference, run, inputs)
        size = part.stat().st_size
    return Exported(file, size, None, difference, tuple(tuple(each[0].shape) for each in inputs))


def _executorch() -> tuple[Any, Any, Any]:
    """The function that lowers a program, XNNPACK's partitioner, and the runtime."""
    try:
        with quiet(), _without_stderr():
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower
            from executorch.runtime import Runtime

            return to_edge_transform_and_lower, XnnpackPartitioner, Runtime.get()
    except Exception as error:  # of an extension made for another torch, anything
        raise ExportError(
            f"The installed executorch doesn't work with torch {torch.__version__} ({brief(error)}). Each release of "
            "executorch is made for one of torch's: install those two in an environment of their own, dyconvert beside "
            "them, and export there."
        ) from error


def _largest(arguments: Sequence[Tensor], axes: Sequence[dict[int, str]]) -> dict[str, int]:
    largest: dict[str, int] = {}
    for argument, named in zip(arguments, axes, strict=True):
        for axis, name in named.items():
            size = argument.shape[axis]
            bound = max(LARGEST_BATCH, size) if name == "batch" else LARGEST_SIZE * size
            largest[name] = max(largest.get(name, 0), bound)
    return largest


@contextlib.contextmanager
def _runner(runtime: Any, file: Path) -> Iterator[Callable[..., Sequence[Tensor]]]:
    """Runs the file, which is read at once: the system moves no file that is open everywhere."""
    with _said_by_runtime("load the exported file"):
        program = runtime.load_program(file.read_bytes())
        method = program.load_method("forward")

    def run(*arguments: Tensor) -> Sequence[Tensor]:
        with _said_by_runtime(f"compute an input {list(arguments[0].shape)}"):
            outputs = method.execute([argument.contiguous() for argument in arguments])
        # The runtime's memory is used again by its next run.
        return [output.clone() for output in outputs if isinstance(output, Tensor)]

    yield run
    del program  # not before: the method reads its bytes, and doesn't keep them


@contextlib.contextmanager
def _said_by_runtime(what: str) -> Iterator[None]:
    """Turns the runtime's error, which is a number, into one with what it told standard error."""
    with _without_stderr() as messages:
        try:
            yield
        except Exception as error:
            reason = messages().splitlines()[-1:] or [brief(error)]
            raise ExportError(
                f"ExecuTorch's runtime can't {what}: {reason[0].rstrip('.')}. Nothing was written. Try a fixed batch, "
                "`dynamic_batch=False`."
            ) from error


@contextlib.contextmanager
def _without_stderr() -> Iterator[Callable[[], str]]:
    """ExecuTorch's compiled code tells standard error about the processor and what it loads, past Python's own.

    Yields:
        What gives the text that was written there meanwhile.
    """
    with tempfile.TemporaryFile() as file:

        def said() -> str:
            file.seek(0)
            return file.read().decode(errors="replace").strip()

        try:
            own_stderr = os.dup(2)
        except OSError:  # there is none
            yield said
            return
        sys.stderr.flush()
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            sys.stderr.flush()
            os.dup2(own_stderr, 2)
            os.close(own_stderr)
