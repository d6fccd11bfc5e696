"""A trial run without data: what each module reads, on the meta device where the model allows it."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dyconvert.arguments import as_call
from dyconvert.copying import clear_hooks, in_eval_mode, on_meta, sharing_copy
from dyconvert.errors import ModelError, brief
from dyconvert.randomness import kept_random_state
from dyconvert.surgery.guesses import guesses
from dyconvert.surgery.recording import META, Call, WeightReads, meta, owners, recording, shapes
from dyconvert.torch_internals.messages import needs_values
from dyconvert.torch_internals.modules import forward_hooks, forward_pre_hooks, times_written
from dyconvert.torch_internals.trees import tree_flatten, tree_map_only


@dataclass
class Observation:
    """What trial runs showed: one in eval mode, and one training step.

    Attributes:
        args, kwargs: the arguments that the model was called with, on the meta device.
        real: the run was one with values, for the model looks at them.
        values: the same arguments with the values of that run, where it was one with values.
        hooked: the model's own hooks took part in the run, for it doesn't run without them.
        calls: every call of every watched module in eval mode, by name, in the order of their first calls.
        training: the same of the training step, backward included; None: the model can't be trained on the example.
        reads: of each watched conv, the functions that were given its weight or bias outside of its own forward.
        outputs: shapes of what the model returned in eval mode.
        functions: the torch functions that were called in eval mode, as :class:`FunctionsCalled` has them.
        edits: the model's forward changes its own parameters.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    real: bool = False
    hooked: bool = False
    calls: dict[str, list[Call]] = field(default_factory=dict)
    training: dict[str, list[Call]] | None = None
    reads: dict[str, set[str]] = field(default_factory=dict)
    outputs: list[Any] = field(default_factory=list)
    functions: list[Any] = field(default_factory=list)
    edits: bool = False
    values: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    @property
    def example(self) -> Any:
        """The arguments in the form in which an example is given: a tuple, or a dict of keyword arguments."""
        return self.kwargs if self.kwargs and not self.args else self.args

    def placed(self, runner: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for another run of a copy that :func:`trial_copy` made."""
        return _placed(runner, self.values or (self.args, self.kwargs), self.real)

    @property
    def image_channels(self) -> int | None:
        """Channels of the model's first tensor input, which is `[N, C, *spatial]`."""
        values = (*self.args, *self.kwargs.values())
        tensors = [leaf for leaf in tree_flatten(values)[0] if isinstance(leaf, Tensor)]
        if not tensors or tensors[0].dim() < 3:
            return None
        # A detection model takes a list of images without a batch dimension.
        batched = any(tensor is tensors[0] for tensor in values)
        return tensors[0].shape[1 if batched else 0]


def observe(model: nn.Module, watched: set[str], example: Any = None, *, train: bool = False) -> Observation | None:
    """Run the model once, in eval mode, and record the calls of the modules named in `watched`.

    Args:
        model: left as it is; a copy runs.
        example: the input tensor, the tuple of arguments, or a dict of keyword arguments. None: common input sizes are
            tried.
        train: run one training step, too.

    Returns:
        None if no input was given and none of those tried fits.

    Raises:
        ModelError: the model can't be copied, or rejects the given example.
    """
    with kept_random_state():
        return _observe(model, watched, example, train)


def _observe(model: nn.Module, watched: set[str], example: Any, train: bool) -> Observation | None:
    calls = [as_call(model, example)] if example is not None else None
    failure: Exception | None = None
    # Detection and optical flow look at values, which the meta device doesn't have: they get a real run. Some models'
    # own hooks keep what their decoders read: they run with their hooks.
    for real, hooked in ((False, False), (True, False), (False, True), (True, True)):
        if real and any(p.device.type == "meta" for p in model.parameters()):
            continue
        if hooked and not _has_hooks(model):
            break
        for args, kwargs in calls or guesses(model):
            runner = trial_copy(model, real, hooked)
            try:
                observation = _record(runner, watched, args, kwargs, real, owners(model, watched))
            except Exception as error:
                failure = error
                if not calls and real is False and needs_values(error):
                    break
                continue
            observation.real, observation.hooked = real, hooked
            observation.values = (args, kwargs) if real else None
            if train:
                runner = trial_copy(model, real, hooked)
                versions = [times_written(p) for p in runner.parameters()]
                originals = owners(model, watched)
                observation.training = _training_step(runner, watched, args, kwargs, real, observation.reads, originals)
                observation.edits |= versions != [times_written(p) for p in runner.parameters()]
            return observation
    if calls:
        raise ModelError(
            f"{type(model).__name__} rejects the example input: {brief(failure)}. Pass an example that the model's "
            "forward takes: `example=...`."
        ) from failure
    return None


def trial_copy(model: nn.Module, real: bool, hooked: bool) -> nn.Module:
    """A copy for a trial run, in eval mode: on the meta device, or with the model's values where `real`."""
    copy = in_eval_mode(sharing_copy(model) if real else on_meta(model))
    if not hooked:
        clear_hooks(copy)
    for module in copy.modules():
        # Its output is shaped as its input, and on the meta device it takes most of the run's time.
        if not real and type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            module.forward = lambda x: x
    return copy


def _has_hooks(model: nn.Module) -> bool:
    return any(forward_hooks(m) or forward_pre_hooks(m) for m in model.modules())


def _record(
    model: nn.Module,
    watched: set[str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    real: bool,
    originals: dict[int, str],
) -> Observation:
    """One run in eval mode.

    Args:
        originals: :func:`owners` of the model that was copied: globals go on holding its convs.
    """
    observation = Observation(meta(args), meta(kwargs))
    versions = [times_written(p) for p in model.parameters()]
    args, kwargs = _placed(model, (args, kwargs), real)
    with (
        torch.no_grad(),
        recording(model, watched) as (observation.calls, stack),
        WeightReads(owners(model, watched), originals, stack, observation.reads) as seen,
    ):
        returned = model(*args, **kwargs)
    observation.outputs = shapes(returned)
    observation.functions = seen.functions
    observation.edits = versions != [times_written(p) for p in model.parameters()]
    return observation


def _training_step(
    model: nn.Module,
    watched: set[str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    real: bool,
    reads: dict[str, set[str]],
    originals: dict[int, str],
) -> dict[str, list[Call]] | None:
    """The calls of one step in training mode, forward and backward; None if the model can't take it."""
    model.train()
    for parameter in model.parameters():
        # A part that is frozen now may be trained later; checkpointed parts run again only for gradients.
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(True)
    args, kwargs = _placed(model, (args, kwargs), real)
    own: dict[str, set[str]] = {}
    with recording(model, watched) as (calls, stack):
        try:
            with torch.enable_grad(), WeightReads(owners(model, watched), originals, stack, own):
                returned = model(*args, **kwargs)
                tensors = [t for t in tree_flatten(returned)[0] if isinstance(t, Tensor) and t.requires_grad]
                if tensors:
                    total: Any = sum((t.abs() if t.is_complex() else t).float().sum() for t in tensors)
                    total.backward()
        except Exception:  # a model may need targets to train, or more images: then nothing is known
            return None
    for name, functions in own.items():
        reads.setdefault(name, set()).update(functions)
    return calls


def _placed(model: nn.Module, values: Any, real: bool) -> Any:
    """Values on the device that a trial copy runs on; zeros in the place of tensors that have no values."""
    device = next((p.device for p in model.parameters()), torch.device("cpu")) if real else META

    def place(t: Tensor) -> Tensor:
        if t.device.type == "meta" and device.type != "meta":
            return torch.zeros(t.shape, dtype=t.dtype, device=device)
        return t.detach().to(device, copy=True)  # a forward may write into it

    return tree_map_only(Tensor, place, values)
