"""The marks that dyconvert leaves on a model: the only file that knows the attributes' names.

Marks are plain attributes, so they go along with copies and pickles; :func:`dyconvert.save` writes them.
"""

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from dyconvert.models import Source
    from dyconvert.narrowing.record import Narrowing
    from dyconvert.surgery.compress import Compression
    from dyconvert.surgery.plan import Plan
    from dyconvert.transforms import Preprocessing

_PLAN = "dyconvert_plan"
_SOURCE = "dyconvert_source"
_NARROWING = "dyconvert_narrowing"
_FUSED = "dyconvert_fused"
_UNFUSED = "dyconvert_unfused"
_PREPROCESSING = "dyconvert_preprocessing"
_COMPRESSION = "dyconvert_compression"


def plan_of(model: nn.Module) -> "Plan | None":
    """The plan that was carried out on a converted model."""
    return vars(model).get(_PLAN)


def mark_plan(model: nn.Module, plan: "Plan") -> None:
    """Note the plan that was carried out; a copy of it, for the caller may go on editing it, without its example."""
    setattr(model, _PLAN, type(plan).model_validate(plan.model_dump()))


def forget_plan(model: nn.Module) -> None:
    """Take the plan off a model whose conversion is taken back."""
    vars(model).pop(_PLAN, None)


def source_of(model: nn.Module) -> "Source | None":
    """Where the static model came from, if the model was saved with a source or loaded."""
    return vars(model).get(_SOURCE)


def mark_source(model: nn.Module, source: "Source") -> None:
    """Note where the static model came from."""
    setattr(model, _SOURCE, source)


def narrowing_of(model: nn.Module) -> "Narrowing | None":
    """The record of narrowing; None: the model has its original width."""
    return vars(model).get(_NARROWING)


def mark_narrowing(model: nn.Module, narrowing: "Narrowing") -> None:
    """Mark a model with a copy of the record of narrowing."""
    setattr(model, _NARROWING, narrowing.model_copy(deep=True))


def fused_of(model: nn.Module) -> tuple[tuple[str, str], ...] | None:
    """The (conv, batch norm) pairs of a fused model, by name. It has no plan: a plan describes the model before."""
    return vars(model).get(_FUSED)


def mark_fused(model: nn.Module, pairs: Any, kept: dict[str, str]) -> None:
    """Note which batch norms went into which convs, and why the others didn't, by name."""
    setattr(model, _FUSED, tuple(pairs))
    setattr(model, _UNFUSED, dict(kept))


def compression_of(model: nn.Module) -> "Compression | None":
    """How a model was compressed, or None: it wasn't."""
    return vars(model).get(_COMPRESSION)


def mark_compression(model: nn.Module, compression: "Compression") -> None:
    """Note how a model was compressed."""
    setattr(model, _COMPRESSION, compression)


def forget_compression(model: nn.Module) -> None:
    """Take the note off a model that is static again."""
    vars(model).pop(_COMPRESSION, None)


def preprocessing_of(model: nn.Module) -> "Preprocessing | None":
    """The preprocessing that the model was fine-tuned or saved with; None: there is none."""
    return vars(model).get(_PREPROCESSING)


def mark_preprocessing(model: nn.Module, preprocessing: "Preprocessing") -> None:
    """Note what images go through."""
    setattr(model, _PREPROCESSING, preprocessing)


def remove_marks(model: nn.Module, but_narrowing: bool = False) -> None:
    """Take the marks off a model that isn't dynamic any more; `but_narrowing` keeps what stays true of it."""
    for name in (_PLAN, _SOURCE, _FUSED, _UNFUSED, *(() if but_narrowing else (_NARROWING,))):
        vars(model).pop(name, None)
