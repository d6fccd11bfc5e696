"""Export to ONNX and to torch.export's `.pt2`, checked against torch before the file is put in its place."""

import inspect
import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dyconvert.arguments import as_arguments, check_module
from dyconvert.copying import in_eval_mode, skeleton
from dyconvert.errors import ExportError, brief
from dyconvert.exporting.chunks import ChunksAsSlices
from dyconvert.exporting.exported import (
    Exported,
    Inputs,
    check_inputs,
    difference_of_onnx,
    difference_of_program,
    explained,
    quiet,
    taken,
    written,
)
from dyconvert.exporting.named_outputs import NamedOutputs, is_plain, output_names
from dyconvert.installation import install_command
from dyconvert.paths import as_path
from dyconvert.surgery.apply import replace_everywhere
from dyconvert.torch_internals.trees import tree_map_only

# A protobuf message, and so an ONNX file, can't be larger than 2 GB; then the weights are in a file beside it.
LARGEST_FILE = 2**31 - 2**24


def export_onnx(
    model: nn.Module,
    file: str | Path,
    example: Any,
    dynamic_batch: bool = True,
    dynamic_size: bool = False,
    fp16: bool = False,
) -> Exported:
    """Write a model as an ONNX file, and compare it with torch by running it in onnxruntime.

    A dynamic conv becomes a matmul that mixes its kernel and one Conv, where the batch is fixed, or one MatMul
    over patches, where it isn't. It is never g convs. The outputs are called as the keys of the dict, or the fields of
    the dataclass, that the model returns them in.

    Args:
        model: converted or static; exported in eval mode, on the CPU, and left as it is. Fused first
            (:func:`~dyconvert.surgery.fuse.fuse`), it becomes a smaller graph.
        file: replaced if it exists, in one step.
        example: an input `[N, C, *spatial]`, or the tuple of the forward's arguments, all of them tensors.
        dynamic_batch: the file takes any number of images. False: the example's.
        dynamic_size: the file takes any spatial size that the model takes. False: the example's.
        fp16: weights and computation in float16, half the size. Inputs and outputs stay as they are.

    Returns:
        What was written, and how far onnxruntime's outputs are from torch's: at the example's batch size and, where
        the batch is dynamic, at 1 and 3 images; where the size is, at another size too.

    Raises:
        ExportError: onnx and onnxscript aren't installed; the model can't be exported, and which operator
            or node prevents it; the file can't be written, or computes something else.
    """
    file = as_path(file, ExportError)
    require("ONNX", "onnx", "onnx", "onnxscript")
    arguments, axes = example_and_axes(model, example, dynamic_batch, dynamic_size)
    reference = on_cpu(model)
    onnx_program, inputs = onnx_program_of(model, reference, arguments, axes, fp16)
    with written(file) as part:
        save_onnx(onnx_program, part)
        difference = difference_of_onnx(reference, part, inputs, fp16)
        size = sum(each.stat().st_size for each in part.parent.iterdir())
    shapes = tuple(tuple(each[0].shape) for each in inputs) if difference is not None else ()
    return Exported(file, size, onnx_program.model.opset_imports[""], difference, shapes)


def onnx_program_of(
    model: nn.Module,
    reference: nn.Module,
    arguments: tuple[Tensor, ...],
    axes: tuple[dict[int, str], ...],
    fp16: bool = False,
    by_terms: bool = False,
) -> tuple[Any, list[Inputs]]:
    """A model as torch's ONNXProgram, and the inputs on which its file is to be compared with torch.

    Args:
        model: the user's, whose forward names the inputs.
        reference: it, by :func:`on_cpu`.
        arguments, axes: by :func:`example_and_axes`.
        by_terms: as in :func:`~dyconvert.exporting.onnx_conv.prepared`.
    """
    from dyconvert.exporting.onnx_conv import prepared, translations

    dynamic_batch = any("batch" in each.values() for each in axes)
    exported = skeleton(reference, lambda t: t)  # shares all tensors
    exported = replace_everywhere(exported, prepared(exported, dynamic_batch, by_terms))
    inputs_named = _input_names(model, len(arguments))
    outputs_named = output_names(what_it_returns(reference, arguments), inputs_named)
    exported = NamedOutputs(exported, outputs_named)
    with ChunksAsSlices() as cuts:
        program = program_of(_Half(exported) if fp16 else exported, reference, arguments, (axes,))
    names = tuple(each or None for each in axes)
    with explained("The graph can't be written as ONNX", reference), quiet():
        onnx_program = torch.onnx.export(
            program,
            (),
            dynamo=True,
            verbose=False,
            opset_version=20,  # which onnx_conv writes
            # The optimiser takes minutes over a thousand nodes and finds little; runtimes have their own.
            optimize=False,
            custom_translation_table=translations(),
            input_names=inputs_named,
            output_names=outputs_named,
            dynamic_shapes=names if any(names) else None,
        )
        _tidy(onnx_program.model)
    return onnx_program, taken(reference, check_inputs(reference, arguments, axes, cuts.parts))


def save_onnx(onnx_program: Any, file: Path) -> None:
    """Write the file, and beside it, in `<file>.data`, weights that are too large to stand in it."""
    weights = sum(value.const_value.nbytes for value in onnx_program.model.graph.initializers.values())
    onnx_program.save(file, external_data=weights > LARGEST_FILE)


def export_torch(
    model: nn.Module, file: str | Path, example: Any, dynamic_batch: bool = True, dynamic_size: bool = False
) -> Exported:
    """Write a model as torch.export's `.pt2`, which `torch.export.load(file).module()` runs without dyconvert.

    It returns what the model returns; in place of an object that torch.export doesn't know, a dict of its tensors.

    Args:
        model, file, example, dynamic_batch, dynamic_size: as in :func:`export_onnx`.

    Raises:
        ExportError: the model can't be exported, and which node prevents it; the file can't be written, or
            computes something else once it is loaded again.
    """
    file = as_path(file, ExportError)
    arguments, axes = example_and_axes(model, example, dynamic_batch, dynamic_size)
    reference = on_cpu(model)
    returned = what_it_returns(reference, arguments)
    if is_plain(returned):
        program = program_of(reference, reference, arguments, axes)
    else:
        named = NamedOutputs(reference, output_names(returned), as_dict=True)
        program = program_of(named, reference, arguments, (axes,))
    with written(file) as part:
        with explained("The program can't be written", reference), quiet():
            # If the disk is full, torch's own writer of files ends the process.
            content = io.BytesIO()
            torch.export.save(program, content)
            part.write_bytes(content.getbuffer())
            del content
            loaded = torch.export.load(part).module()
        inputs = taken(reference, check_inputs(reference, arguments, axes))
        difference = difference_of_program(reference, loaded, inputs)
        size = part.stat().st_size
    return Exported(file, size, None, difference, tuple(tuple(each[0].shape) for each in inputs))


class _Half(nn.Module):
    """A model in float16, between inputs and outputs that keep their dtypes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = in_eval_mode(skeleton(model, lambda t: t.half() if t.is_floating_point() else t))

    def forward(self, *arguments: Any) -> Any:
        dtype = next((t.dtype for t in arguments if isinstance(t, Tensor) and t.is_floating_point()), torch.float32)

        def cast(values: Any, to: torch.dtype) -> Any:
            return tree_map_only(Tensor, lambda t: t.to(to) if t.is_floating_point() else t, values)

        return cast(self.model(*cast(arguments, torch.float16)), dtype)


def require(target: str, extra: str, *packages: str) -> None:
    """Say which packages of an extra this export lacks."""
    from importlib.util import find_spec

    if missing := [name for name in packages if find_spec(name) is None]:
        raise ExportError(f"{target} export needs {' and '.join(missing)}. Run `{install_command(extra)}`.")


def on_cpu(model: nn.Module) -> nn.Module:
    if any(t.is_meta for t in model.state_dict().values() if isinstance(t, Tensor)):
        raise ExportError("The model is on the meta device and has no values to export. Load its weights first.")
    copy = in_eval_mode(skeleton(model, lambda t: t.detach().cpu()))
    return copy.requires_grad_(False)


def example_and_axes(
    model: nn.Module, example: Any, dynamic_batch: bool, dynamic_size: bool
) -> tuple[tuple[Any, ...], tuple[dict[int, str], ...]]:
    """The example on the CPU, with two images or more where their number is dynamic, and the dynamic axes."""
    check_module(model)
    arguments = as_arguments(example)
    tensors = [a for a in arguments if isinstance(a, Tensor) and a.dim()]
    # Beside images there may be what conditions them: a step [N], tokens [N, L].
    if len(tensors) < len(arguments) or not any(a.dim() > 2 for a in tensors):
        raise ExportError(
            f"{type(model).__name__} is to be exported with an example of {', '.join(map(_kind, arguments)) or '()'}. "
            "Models whose inputs are tensors, one of them [N, C, *spatial], can be exported; export such a part of "
            "this one."
        )
    arguments = tree_map_only(Tensor, lambda t: t.detach().cpu(), arguments)
    if dynamic_batch and len({a.shape[0] for a in arguments}) == 1 and arguments[0].shape[0] == 1:
        # torch.export takes a size of 1 for a constant.
        arguments = tuple(torch.cat([a, a]) for a in arguments)
    spatial = {1: ("length",), 2: ("height", "width"), 3: ("depth", "height", "width")}
    axes = []
    for number, argument in enumerate(arguments):
        named = {0: "batch"} if dynamic_batch else {}
        if dynamic_size:
            names = spatial.get(argument.dim() - 2) or tuple(f"size_{d}" for d in range(argument.dim() - 2))
            named |= {2 + d: name + (f"_{number}" if number else "") for d, name in enumerate(names)}
        axes.append(named)
    return arguments, tuple(axes)


def _kind(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _input_names(model: nn.Module, count: int) -> list[str]:
    if count == 1:
        return ["input"]
    parameters = list(inspect.signature(model.forward).parameters)
    return parameters[:count] if len(parameters) >= count else [f"input_{i}" for i in range(count)]


def what_it_returns(model: nn.Module, arguments: tuple[Tensor, ...]) -> Any:
    try:
        with torch.no_grad():
            return model(*arguments)
    except Exception as error:
        raise ExportError(
            f"{type(model).__name__} rejects the example: {brief(error)}. Give an input that it takes."
        ) from error


def program_of(
    model: nn.Module, users: nn.Module, arguments: tuple[Tensor, ...], axes: Any, largest: dict[str, int] | None = None
) -> Any:
    """The exported program of `model`, which is the user's or is around it; `axes` as its forward's arguments are.

    Args:
        largest: the bound of each axis, by name, where sizes aren't to be unlimited.
    """
    dynamic = torch.export.Dim.DYNAMIC
    shapes = tree_map_only(str, lambda axis: dynamic(max=largest[axis]) if largest else dynamic, axes)
    with explained(f"{type(users).__name__} can't be exported", users), quiet(), torch.no_grad():
        return torch.export.export(model, arguments, dynamic_shapes=shapes, strict=False)


def _tidy(model: Any) -> None:
    """Fold constants: shapes, mostly."""
    from onnx_ir.passes import common
    from onnxscript import optimizer

    optimizer.fold_constants(model)
    common.RemoveUnusedNodesPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.DeduplicateInitializersPass()(model)
    # Each node's stack trace: the user's paths, and more bytes than a small model's weights.
    common.ClearMetadataAndDocStringPass()(model)
