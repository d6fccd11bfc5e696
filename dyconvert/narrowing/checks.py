"""Checks narrowing's options, and that the model takes its inputs before and after."""

from collections.abc import Callable
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from dyconvert.arguments import as_arguments
from dyconvert.copying import clear_hooks, in_eval_mode, skeleton
from dyconvert.errors import ModelError, PlanError, brief
from dyconvert.marks import narrowing_of
from dyconvert.narrowing.images import Images
from dyconvert.numbers import share, whole
from dyconvert.outputs import tensors_in
from dyconvert.surgery.blocks import check_convertible
from dyconvert.surgery.example import example_for
from dyconvert.torch_internals.modules import BatchNorm
from dyconvert.torch_internals.trees import tree_map_only

Init = Literal["least-squares", "merge", "l1"]


def checked_init(
    model: nn.Module,
    width: float | None,
    flops: float | None,
    data: Any,
    init: str | None,
    round_to: int,
    calibration_images: int,
    static: bool,
    choices: dict[str, Any],
) -> Init:
    """Check the options; returns the init.

    Raises:
        ModelError: the model can't be narrowed as a whole, or is narrowed already.
        PlanError: an option is out of range, or two don't go together.
    """
    check_convertible(model)
    if narrowing_of(model) is not None:
        raise ModelError("The model is narrowed already. Narrow the original, by as much as is wanted in all.")
    if (width is None) == (flops is None):
        raise PlanError("narrow() takes a width or a share of the multiply-adds (flops). Give one of the two.")
    for name, value in (("width", width), ("flops", flops)):
        if value is not None:
            share(name, value)
    if init is None:
        init = "merge" if data is None else "least-squares"
    if init not in get_args(Init):
        raise PlanError(f"init is one of {', '.join(get_args(Init))}, not {init!r}.")
    known = cast(Init, init)
    if known == "least-squares" and data is None:
        raise PlanError(
            "init='least-squares' solves the weights on images, and there are none. Give `data=...`, or choose "
            "`init='merge'`."
        )
    for name, value in (("round_to", round_to), ("calibration_images", calibration_images)):
        whole(name, value, least=1)
    if static and choices:
        raise PlanError(f"static=True converts nothing, so {', '.join(choices)} would do nothing. Give one of them.")
    return known


def example_of(model: nn.Module, example: Any, images: Images | None) -> tuple[Any, ...]:
    """The forward's arguments: the user's example, or calibration images, or an example of a common size."""
    if example is None and images is not None:
        return images.part(0, 2)
    return example_for(model) if example is None else as_arguments(example)


def bare(model: nn.Module) -> nn.Module:
    """A copy to run, in eval mode and without the user's hooks. It shares weights and batch norms' statistics.

    Other buffers and plain attributes are copies: a forward that counts its calls counts in the copy.
    """
    shared = {id(b) for m in model.modules() if isinstance(m, BatchNorm) for b in m.buffers()}

    def tensor(t: Tensor) -> Tensor:
        return t.detach() if isinstance(t, nn.Parameter) or id(t) in shared else t.detach().clone()

    runner = in_eval_mode(skeleton(model, tensor))
    clear_hooks(runner)
    return runner


def check_no_scripts(model: nn.Module) -> None:
    """Refuse a model with parts that torch.jit has scripted or traced: narrowing watches modules by hooks."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(
                f"{name or type(model).__name__} is a ScriptModule, which takes no hooks, so its channels can't be "
                "followed. Narrow the model before torch.jit scripts or traces it."
            )


def check_takes(model: nn.Module, arguments: tuple[Any, ...], what: str) -> None:
    """Check that the model accepts these arguments."""
    try:
        with torch.no_grad():
            model(*tree_map_only(Tensor, torch.clone, arguments))
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} rejects the {what}: {brief(error)}. Give arguments of its forward, at its "
            "size and normalised as in its training: `example=...`, `data=...`."
        ) from error


def check_runs(original: nn.Module, narrowed: nn.Module, example: tuple[Any, ...]) -> None:
    """Check that a narrowed model runs, and returns the same shapes."""
    runner = bare(narrowed)
    inside: list[str] = []

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: inside.append(name)

    def leave(*_: Any) -> None:
        inside.pop()

    for name, module in runner.named_modules():
        module.register_forward_pre_hook(enter(name))
        module.register_forward_hook(leave)
    with torch.no_grad():
        expected = _shapes(original(*tree_map_only(Tensor, torch.clone, example)))
        try:
            shapes = _shapes(runner(*tree_map_only(Tensor, torch.clone, example)))
        except Exception as error:
            where = inside[-1] if inside and inside[-1] else type(narrowed).__name__
            raise ModelError(
                f"{type(narrowed).__name__} doesn't run when its channels are narrowed: {where} raises {brief(error)}. "
                "It counts on their number; keep the channels that it reads: `keep=[...]`."
            ) from error
    if shapes != expected:
        raise ModelError(
            f"{type(narrowed).__name__} returns {shapes} when its channels are narrowed, not {expected}. "
            "Keep the channels of its last layers: `keep=[...]`."
        )


def _shapes(output: Any) -> list[list[int]]:
    return [list(t.shape) for _, t in tensors_in(output)]
