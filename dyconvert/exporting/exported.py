"""An exported file: written in one step, compared with torch, and what prevents it said in one message."""

import contextlib
import errno
import functools
import keyword
import logging
import re
import site
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dyconvert.errors import DyconvertError, ExportError, brief
from dyconvert.files import replaced
from dyconvert.limits import read_bytes
from dyconvert.outputs import tensors_in

# Relative to the largest output; beyond, the exported file doesn't compute what the model does. float16 has 11
# significant bits, and its rounding adds up over the layers.
TOLERANCE = 1e-3
TOLERANCE_FP16 = 5e-2

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Exported:
    """A written export.

    Attributes:
        file: the exported file; for ONNX above 2 GB, the weights are beside it in `<file>.data`, for OpenVINO in the
            `.bin` of the same name.
        bytes: size of all that was written.
        opset: the ONNX operator set's version; None for other formats.
        difference: largest difference of an output from torch's, over all checked inputs, relative to the output's
            largest absolute value; None if onnxruntime isn't installed to run the file.
        checked: the shapes of the first input that were compared.
    """

    file: Path
    bytes: int
    opset: int | None
    difference: float | None
    checked: tuple[tuple[int, ...], ...] = ()


# Of a disk, or of what a user or a file may take of it.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# An ONNX file whose weights are in a file beside it has less.
_WITHOUT_WEIGHTS = 256 * 2**20


@contextlib.contextmanager
def written(file: Path) -> Iterator[Path]:
    """A place to write `file` to, from which it is moved to its own at the end; after an error nothing is left.

    What stands beside it there (`<file>.data`) is moved with it, first.
    """
    stale = _has_weights_beside(file)
    with replaced(file, ExportError) as part:
        yield part
        stale = stale and not part.with_name(part.name + ".data").exists()
    if stale:
        file.with_name(file.name + ".data").unlink(missing_ok=True)


def _has_weights_beside(file: Path) -> bool:
    """Whether `<file>.data` belongs to the file that stands there: it names it."""
    try:
        return (file.name + ".data").encode() in read_bytes(file, _WITHOUT_WEIGHTS)
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The exporters' warnings and log lines are about their own insides."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


# For texts in an exporter's message, the advice that is added.
_WORKAROUNDS = (
    (
        r"No ONNX function found|No decompositions registered|UnsupportedOperator",
        "ONNX has no translation of that operator: write that part of the model with others, or export for "
        "torch (export_torch, --to torch), which has them all.",
    ),
    (
        r"data-dependent|\.item\(\)|DataDependent|unbacked",
        "The forward decides by a tensor's values, which a graph can't: export the part of the model that doesn't "
        "(a detector's backbone, say), or write that decision with torch.where.",
    ),
    (
        r"specializ|Constraints violated|dynamic",
        "A size that is to vary is a constant in the forward: export a fixed batch with `dynamic_batch=False`, "
        "and a fixed size without `dynamic_size=True`.",
    ),
)
_OTHERWISE = "Try a fixed batch, `dynamic_batch=False`, or export the part of the model that is plain tensor code."
_NODES = (
    r"No ONNX function found for <OpOverload\(op='([\w.:]+)'",
    r"translating node %\S+[^\n]*?target=([\w.:]+)",
    r"While executing %\S+[^\n]*?target=([\w.:]+)",
    r"(aten[.:]+\w+(?:\.\w+)?)",
)


@contextlib.contextmanager
def explained(what: str, model: nn.Module) -> Iterator[None]:
    """Turns an exporter's failure into an error that names the operator or the line, and the workaround."""
    try:
        yield
    except DyconvertError:
        raise
    except Exception as error:
        chain = list(_chain(error))
        if full := next((each for each in chain if isinstance(each, OSError) and each.errno in _FULL), None):
            raise ExportError(
                f"{what}: {full.strerror}. Free some space or choose another place; what was there is unchanged."
            ) from error
        if name := _no_name_in_code(model):
            raise ExportError(
                f"{what}: torch writes the names of modules into code, and {name!r} is none that Python reads "
                f"({brief(error)}). Rename that key, in the ModuleDict or in add_module, and convert again."
            ) from error
        text = "\n".join(str(each) for each in chain)
        node = next((match[1] for pattern in _NODES if (match := re.search(pattern, text))), None)
        workaround = next((advice for pattern, advice in _WORKAROUNDS if re.search(pattern, text)), _OTHERWISE)
        reason = next((line.strip() for each in reversed(chain) for line in str(each).splitlines() if line.strip()), "")
        where = _line_of_the_model(chain)
        at = (f" at operator {node}" if node else "") + (f", in {where}" if where else "")
        raise ExportError(f"{what}{at}: {reason.rstrip('.') or type(error).__name__}. {workaround}") from error


def _no_name_in_code(model: nn.Module) -> str | None:
    """The name of a module that can't stand in code: with a Python keyword, or with quotes in it."""
    for name, _ in model.named_modules():
        if any(keyword.iskeyword(part) for part in name.split(".")) or set(name) & set("'\"\\\n"):
            return name
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _line_of_the_model(chain: Sequence[BaseException]) -> str | None:
    """The innermost line of a forward that is neither torch's, nor an ONNX library's, nor ours."""
    for error in reversed(chain):
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            if frame.name == "forward" and not is_of_libraries(frame.filename):
                return f"{Path(frame.filename).name}, line {frame.lineno} (`{frame.line}`)"
    return None


def is_of_libraries(file: str) -> bool:
    """Whether a source file is the standard library's, torch's, an ONNX library's or ours, where those are installed.

    A path says nothing by the names in it: a user's model may lie in a folder called `dyconvert` or `torch`.
    """
    path = Path(file).resolve()
    standard, *others = _installed()
    if any(path.is_relative_to(folder) for folder in others):
        return True
    # Other packages, the user's among them, are installed within the standard library's folder.
    return path.is_relative_to(standard) and not any(path.is_relative_to(folder) for folder in _packages())


@functools.cache
def _installed() -> tuple[Path, ...]:
    """The standard library's folder, and those of the packages that an export runs through."""
    specs = filter(None, map(find_spec, ("torch", "onnx", "onnxscript", "onnx_ir", "onnxruntime", "dyconvert")))
    folders = (folder for spec in specs for folder in spec.submodule_search_locations or ())
    return tuple(Path(folder).resolve() for folder in (sysconfig.get_path("stdlib"), *folders))


@functools.cache
def _packages() -> tuple[Path, ...]:
    """The folders that packages are installed to."""
    folders = (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages())
    return tuple(Path(folder).resolve() for folder in folders)


def check_inputs(model: nn.Module, arguments: Inputs, axes: Sequence[dict[int, str]], least: int = 1) -> list[Inputs]:
    """Random inputs like the example; where the batch is dynamic, at 1 and 3 images; where the size is, another.

    Args:
        least: the fewest images that a program takes which cuts its batch into so many parts.
    """
    generator = torch.Generator().manual_seed(0)

    def like(batch: int | None, more: int) -> Inputs:
        checks = []
        for argument, dynamic in zip(arguments, axes, strict=True):
            shape = list(argument.shape)
            for axis, name in dynamic.items():
                if name != "batch":
                    shape[axis] += more
                elif batch is not None:
                    shape[axis] = batch
            if argument.is_floating_point():
                checks.append(torch.randn(shape, generator=generator).to(argument.dtype))
            else:
                checks.append(argument.flatten()[:1].expand(shape).contiguous())
        return tuple(checks)

    dynamic_batch = any("batch" in each.values() for each in axes)
    dynamic_size = any(set(each.values()) - {"batch"} for each in axes)
    inputs = [arguments]
    if dynamic_batch:
        inputs += [like(least, 0), like(max(3, least + 1), 0)]
    if dynamic_size:
        inputs.append(like(None, 32))
    return inputs


def taken(model: nn.Module, inputs: Sequence[Inputs]) -> list[Inputs]:
    """The inputs that the model itself takes: a model that halves its batch doesn't take a single image.

    Raises:
        ExportError: it takes none but the first, the example.
    """
    accepted, failure = list(inputs[:1]), None
    for arguments in inputs[1:]:
        try:
            _run(model, arguments)
        except ExportError as error:
            failure = error
        else:
            accepted.append(arguments)
    if failure is not None and len(accepted) == 1:
        raise failure
    return accepted


def difference_of_onnx(model: nn.Module, file: Path, inputs: Sequence[Inputs], fp16: bool) -> float | None:
    """The largest relative difference of onnxruntime's outputs from torch's; None where it isn't installed.

    Raises:
        ExportError: onnxruntime can't run the file, or it computes something else.
    """
    try:
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    differences = []
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        for arguments in inputs:
            feeds = {value.name: a.numpy() for value, a in zip(session.get_inputs(), arguments, strict=True)}
            outputs = [torch.from_numpy(each) for each in session.run(None, feeds)]
            differences.append(_difference(_run(model, arguments), outputs))
    except DyconvertError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise ExportError(
            f"onnxruntime can't run the exported file: {lines[0] if lines else type(error).__name__} "
            "Nothing was written. Try a fixed batch, `dynamic_batch=False`."
        ) from error
    return _accepted(max(differences), fp16)


def difference_of_program(
    model: nn.Module, run: Callable[..., Any], inputs: Sequence[Inputs], fp16: bool = False
) -> float:
    """The largest relative difference from the model's outputs of what an exported program, run by `run`, returns.

    Raises:
        ExportError: the program can't be run at one of the inputs, or computes something else.
    """
    differences = []
    for arguments in inputs:
        try:
            with torch.no_grad():
                outputs = [t for _, t in tensors_in(run(*arguments), numbers=False)]
        except DyconvertError:
            raise
        except Exception as error:
            raise ExportError(
                f"The exported program rejects an input {list(arguments[0].shape)}: {error} Nothing was written. "
                "Try a fixed batch, `dynamic_batch=False`."
            ) from error
        differences.append(_difference(_run(model, arguments), outputs))
    return _accepted(max(differences), fp16)


def _run(model: nn.Module, arguments: Inputs) -> list[Tensor]:
    try:
        with torch.no_grad():
            return [t for _, t in tensors_in(model(*arguments), numbers=False)]
    except Exception as error:
        raise ExportError(
            f"{type(model).__name__} itself rejects an input {list(arguments[0].shape)}, which the exported file "
            f"takes: {type(error).__name__}: {error}. Export that size fixed."
        ) from error


def _difference(expected: list[Tensor], actual: list[Tensor]) -> float:
    if [t.shape for t in expected] != [t.shape for t in actual]:
        raise ExportError(
            f"The exported file returns {[list(t.shape) for t in actual]}, and the model "
            f"{[list(t.shape) for t in expected]}. Nothing was written."
        )
    largest = 0.0
    for a, b in zip(expected, actual, strict=True):
        if a.numel():
            a, b = a.double(), b.double()
            apart = (a - b).abs().max() / a.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
            largest = max(largest, apart.nan_to_num(nan=float("inf")).item())
    return largest


def _accepted(difference: float, fp16: bool) -> float:
    tolerance = TOLERANCE_FP16 if fp16 else TOLERANCE
    if difference > tolerance:
        hint = (
            "Some values don't fit into float16: export in float32."
            if fp16
            else "Please report it, and try a fixed batch, `dynamic_batch=False`."
        )
        raise ExportError(
            f"The exported file computes something else than the model: {difference:.1e} relative difference, where "
            f"{tolerance:.0e} is allowed. Nothing was written. {hint}"
        )
    return difference
