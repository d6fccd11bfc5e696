"""compress(model): a converted model whose experts and predictors take fewer bits, for inference."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from torch import nn

from dyconvert.copying import in_eval_mode, sharing_copy, skeleton
from dyconvert.differences import Differences, verify
from dyconvert.errors import ModelError
from dyconvert.marks import compression_of, mark_compression, plan_of
from dyconvert.nn import CoefficientPredictor, DynamicConv
from dyconvert.nn.compress import DTYPES, worth_it
from dyconvert.nn.linear import CompressedLinear
from dyconvert.randomness import kept_random_state
from dyconvert.surgery.convert import example_of

# The largest difference, relative to the largest output, at which a compressed model counts as the same.
TOLERANCE = {"int8": 5e-2, "bfloat16": 2e-2}
# Beyond, predictors are kept in bfloat16 where experts are in int8.
_CLOSE = 1e-2
# A predictor's linear layers: attributes of `CoefficientPredictor`.
_LAYERS = ("hidden", "linear")


class Compression(BaseModel):
    """How a model was compressed.

    Attributes:
        dtype: of the experts' differences, `"int8"` or `"bfloat16"`.
        predictors: of the predictors' weights.
        difference: how far the outputs for the example were from those before, relative to the largest; None: there was
            no example.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dtype: Literal["int8", "bfloat16"]
    predictors: Literal["int8", "bfloat16"]
    difference: float | None = None

    def __str__(self) -> str:
        difference = "not compared" if self.difference is None else f"largest difference {self.difference:.1e} relative"
        also = "" if self.predictors == self.dtype else f" (the predictors to {self.predictors})"
        return f"compressed to {self.dtype}{also}, {difference}"


def compress(model: nn.Module, dtype: str = "int8", example: Any = None, *, check: bool = True) -> nn.Module:
    """Keep each conv's experts as their mean and their differences, in fewer bits, and the predictors' weights too.

    For inference only: at a batch of one most of what a dynamic conv costs over a static one is reading the experts.
    The mean stays in its dtype. On a CPU the compiled kernels read compressed experts as they are, and add in float32;
    elsewhere they are unpacked at each call. Convs with short kernels, depthwise ones mostly, stay as they are.

    Args:
        model: a converted model, trained or not, fused or not; left as it is.
        dtype: `"int8"`, with a scale for each expert and output channel, or `"bfloat16"`. With int8, the predictors are
            kept in bfloat16 where the outputs would differ by more than 1e-2 otherwise.
        example: an input, or the tuple of the forward's arguments, on which the outputs are compared. None: that of the
            conversion, or random images of a common size that fits.
        check: compare the outputs, and refuse a model that computes something else.

    Returns:
        A new model of the same class in eval mode, nothing of which can be trained. Its `dyconvert_compression` says
        how far its outputs are from `model`'s. It can be saved, loaded, exported, fused and collapsed.

    Raises:
        ModelError: nothing in the model is dynamic, or it is compressed already; the dtype isn't known; an expert isn't
            finite; the outputs differ by more than :data:`TOLERANCE`.
    """
    _check(model, dtype)
    replaced = {id(p) for module in _compressible(model) for p in module.parameters(recurse=False)}

    def made(predictors: str) -> tuple[nn.Module, Differences | None]:
        # What is about to be replaced may be shared with the original until then.
        result = skeleton(model, lambda t: t.detach() if id(t) in replaced else t.detach().clone())
        in_eval_mode(compress_in_place(result, dtype, predictors))
        return result, _compared(model, result, example) if check else None

    predictors = dtype
    result, differences = made(predictors)
    if dtype == "int8" and differences is not None and differences.relative > _CLOSE:
        # What predictors read is much alike in all images, so their rounding shifts all images' coefficients alike.
        predictors = "bfloat16"
        result, differences = made(predictors)
    if differences is not None and differences.relative > TOLERANCE[dtype]:
        _refuse(model, differences, dtype, example)
    difference = None if differences is None else differences.relative
    mark_compression(result, Compression(dtype=_named(dtype), predictors=_named(predictors), difference=difference))
    return result


def _named(dtype: str) -> Any:
    """A dtype's name, checked against those that are known."""
    return dtype


def compress_in_place(model: nn.Module, dtype: str, predictors: str, *, fill: bool = True) -> nn.Module:
    """Replace banks and linears by compressed ones, without a check.

    Args:
        dtype, predictors: of the experts' differences, and of the predictors' weights.
        fill: False: with no values, which will be loaded.
    """
    for module in _compressible(model):
        if isinstance(module, DynamicConv):
            module.compress(DTYPES[dtype], fill=fill)
            continue
        for name in _LAYERS:
            layer = getattr(module, name)
            if layer is not None:
                make = CompressedLinear.of if fill else CompressedLinear.empty_like
                setattr(module, name, make(layer, DTYPES[predictors]).train(layer.training))
    return model.requires_grad_(False)


def _compressible(model: nn.Module) -> list[nn.Module]:
    modules: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, CoefficientPredictor) or (
            isinstance(module, DynamicConv) and worth_it(module.weight.shape[1:])
        ):
            modules.append(module)
    return modules


def _check(model: nn.Module, dtype: str) -> None:
    if dtype not in DTYPES:
        raise ModelError(f"A model is compressed to {' or '.join(DTYPES)}, not {dtype!r}.")
    convs = {name: module for name, module in model.named_modules() if isinstance(module, DynamicConv)}
    if not convs:
        raise ModelError(
            f"{type(model).__name__} has no dynamic conv, so there is nothing to compress. Convert it first."
        )
    if compression_of(model) is not None:
        raise ModelError(f"This {type(model).__name__} is compressed already. Compress the model that it was before.")
    for name, conv in convs.items():
        if conv.weight.is_meta:
            raise ModelError("The model is on the meta device and has no values to compress. Load its weights first.")
        if not conv.weight.isfinite().all():
            raise ModelError(f"An expert of {name or 'the model'} isn't finite, and can't be compressed.")


def _compared(model: nn.Module, result: nn.Module, example: Any) -> Differences | None:
    """How far the outputs are apart; None: no input is known."""
    with kept_random_state():
        example = example_of(model, plan_of(model), example)
        return None if example is None else verify(model, result, example)


def _refuse(model: nn.Module, differences: Differences, dtype: str, example: Any) -> None:
    # A model that draws random numbers by itself differs from itself.
    itself = _compared(model, sharing_copy(model), example)
    if itself is not None and itself.relative >= differences.relative / 10:
        return
    raise ModelError(
        f"Compressed to {dtype}, {type(model).__name__} computes something else: {differences}; {TOLERANCE[dtype]:g} "
        "relative is allowed. Nothing was changed. Take 'bfloat16', or check=False and measure the accuracy."
    )
