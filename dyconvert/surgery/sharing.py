"""Which convs of each block share a predictor, and which input it reads: found out by running the blocks."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dyconvert.arguments import map_tensors
from dyconvert.copying import copied
from dyconvert.errors import brief, some
from dyconvert.names import holds, within
from dyconvert.nn.handing import maps_in
from dyconvert.surgery.blocks import innermost_blocks
from dyconvert.surgery.hooks import has_pre_hooks, is_hooked
from dyconvert.surgery.observe import Observation, trial_copy
from dyconvert.surgery.plan import Plan, PlannedBlock
from dyconvert.surgery.probe import Prober
from dyconvert.surgery.recording import Call
from dyconvert.surgery.values import call_with_values


class Sharing:
    """Settles for every block of a plan which of its convs share a predictor, and which input it reads."""

    def __init__(self, plan: Plan, model: nn.Module, observed: Observation | None, example: Any) -> None:
        self.plan = plan
        self.model = model
        self.observed = observed
        self.example = example
        self.several_names = _with_several_names(model)
        # Hooks of the block itself run before the predictor reads.
        run = observed is not None and observed.hooked
        self.hooked = {} if run else {name: module for name, module in model.named_modules() if is_hooked(module)}
        self.order = {name: index for index, name in enumerate(observed.calls)} if observed is not None else {}

    def settle(self, stems: set[str]) -> dict[str, str]:
        """Fill in the plan; why convs of a block have predictors of their own, by block."""
        failures: dict[str, str] = {}
        reasons_by_block: dict[str, dict[str, str]] = {}
        for block, convs in innermost_blocks(self.model, [conv.name for conv in self.plan.converted]).items():
            kind = type(self.model.get_submodule(block)).__name__
            if any(holds(block, stem) for stem in stems):
                for name in convs:
                    self.plan[name].note = f"in no block but {kind}, which reads the image"
            elif self.observed is None:
                failures[block] = f"{kind}: no input is known, so it can't be run"
                for name in convs:
                    self.plan[name].note = failures[block]
            else:
                reasons_by_block[block] = {name: reason for name in convs if (reason := self._outside(block, name))}
                self._note(block, convs, reasons_by_block[block], failures)
        if reasons_by_block:
            self._probe(reasons_by_block, failures)
        return failures

    def _outside(self, block: str, name: str) -> str | None:
        """Why a conv can't wait for its block's coefficients, from how it is called."""
        if name in self.several_names:
            return f"{name} has several names"
        if hooked := next((each for each in self.hooked if self._hook_may_change(each, block, name)), None):
            return f"a hook on {hooked} may change what {name} sees, and planning doesn't run it"
        for calls, when in ((self.observed.calls, ""), (self.observed.training or {}, " in training")):
            if any(block not in call.within for call in calls.get(name, [])):
                return f"{name} is called from outside of the block's call{when}"
        return None

    def _hook_may_change(self, hooked: str, block: str, conv: str) -> bool:
        """Whether a hook on a module within the block may run between the predictor's reading and the conv's."""
        if hooked == block or not holds(block, hooked):
            return False
        if holds(hooked, conv):  # what runs after the conv's own forward doesn't change its input
            return has_pre_hooks(self.hooked[hooked])
        return self.order.get(hooked, -1) < self.order.get(conv, 0)

    def _note(self, block: str, convs: Sequence[str], reasons: Mapping[str, str], failures: dict[str, str]) -> None:
        kind = type(self.model.get_submodule(block)).__name__
        for name in convs:
            if name in reasons:
                self.plan[name].note = f"{kind}: {reasons[name]}"
                failures.setdefault(block, self.plan[name].note)

    def _probe(self, reasons_by_block: dict[str, dict[str, str]], failures: dict[str, str]) -> None:
        runner = self._runner()
        calls = self._calls(runner, set(reasons_by_block))
        names = [conv.name for conv in self.plan.converted]
        prober = Prober(runner, set(names))
        for block, reasons in reasons_by_block.items():
            together = [name for name in names if holds(block, name) and name not in reasons]
            if len(together) < 2:
                self._alone(block, together, failures)
                continue
            module = runner.get_submodule(block)
            convs = {within(block, name): runner.get_submodule(name) for name in together}
            call = calls.get(block)
            if call is None:
                outcome: dict[str, str] | _Read = dict.fromkeys(
                    convs, "it is called neither in eval mode nor in training"
                )
            else:
                outcome = self._read(block, module, convs, call, prober)
            if isinstance(outcome, _Read):
                unfit = prober.unfit(module, convs, call, outcome.value)
                if convs.keys() - unfit.keys():
                    self._share(block, together, unfit, outcome, failures)
                    continue
                outcome = unfit
            self._note(block, together, {name: outcome[within(block, name)] for name in together}, failures)

    def _share(
        self, block: str, convs: Sequence[str], unfit: Mapping[str, str], read: "_Read", failures: dict[str, str]
    ) -> None:
        sharing = [name for name in convs if within(block, name) not in unfit]
        whys = {name: f"{name}: {unfit[within(block, name)]}" for name in convs if within(block, name) in unfit}
        self._note(block, convs, whys, failures)
        if len(sharing) < 2:
            self._alone(block, sharing, failures)
            return
        self.plan.blocks.append(PlannedBlock(name=block, reads=read.reads, in_channels=read.channels))
        for name in sharing:
            self.plan[name].block = block

    def _alone(self, block: str, convs: Sequence[str], failures: dict[str, str]) -> None:
        kind = type(self.model.get_submodule(block)).__name__
        for name in convs:
            self.plan[name].note = f"{kind}: no other conv of the block could share with it"

    def _runner(self) -> nn.Module:
        """A copy that the blocks are run in: with values, where the model has values."""
        if any(p.device.type == "meta" for p in self.model.parameters()):
            self.plan.warnings.append(
                "The model is on the meta device: which convs see their block's images in order wasn't shown on values."
            )
            return trial_copy(self.model, False, self.observed.hooked)
        model = copied(self.model) if self.observed.edits else self.model
        return trial_copy(model, True, self.observed.hooked)

    def _calls(self, runner: nn.Module, blocks: set[str]) -> dict[str, Call]:
        """The first call of each block: of a run with values, or else made up after a trial run's."""
        calls: dict[str, Call] = {}
        handles = [
            runner.get_submodule(name).register_forward_pre_hook(_keeper(name, calls), with_kwargs=True)
            for name in blocks
        ]
        device = next(runner.parameters()).device
        try:
            if device.type != "meta":
                args, kwargs = call_with_values(self.model, self.observed, self.example, device, 1)
                with torch.no_grad():
                    runner(*args, **kwargs)
        except Exception as error:
            self.plan.warnings.append(
                f"The blocks were run on made-up values: the model fails on noise ({brief(error)})."
            )
        finally:
            for handle in handles:
                handle.remove()
        for name in blocks - calls.keys():
            for observed_calls in (self.observed.calls, self.observed.training or {}):
                if name in observed_calls and name not in calls:
                    calls[name] = Call(
                        *_made_up((observed_calls[name][0].args, observed_calls[name][0].kwargs), device)
                    )
        return calls

    def _read(
        self, block: str, module: nn.Module, convs: Mapping[str, nn.Module], call: Call, prober: Prober
    ) -> "_Read | dict[str, str]":
        """The argument that the block's predictor is to read, or why there is none."""
        if len({conv.weight.dtype for conv in convs.values()}) > 1:
            return dict.fromkeys(convs, "its convs are of several dtypes")
        dims = {len(conv.kernel_size) for conv in convs.values()}
        if len(dims) > 1:
            return dict.fromkeys(convs, "its convs are of several numbers of dimensions")
        arguments = _named(module.forward, call)
        maps = {name: value for name, value in arguments.items() if _is_read(value, *dims)}
        if not maps:
            kinds = some([type(value).__name__ for value in arguments.values()] or ["nothing"], 3)
            return dict.fromkeys(convs, f"what it is given is no feature map ({kinds})")
        if len(maps) > 1:
            try:
                feeding = prober.feeding(module, convs, call, maps)
            except Exception as error:
                return dict.fromkeys(convs, f"it can't be run by itself ({brief(error)})")
            if len(feeding) != 1:
                what = "several inputs" if feeding else "no one input"
                return dict.fromkeys(convs, f"its convs descend from {what} of the block")
            maps = {feeding[0]: maps[feeding[0]]}
        (name, value), *_ = maps.items()
        channels = sum(t.shape[1] for t in maps_in(value))
        for each in (*self.observed.calls.get(block, []), *(self.observed.training or {}).get(block, [])):
            other = _named(module.forward, each).get(name)
            if not _is_read(other, *dims) or sum(t.shape[1] for t in maps_in(other)) != channels:
                return dict.fromkeys(convs, f"it is called with different kinds of {name}")
        return _Read(name, value, channels)


class _Read(NamedTuple):
    """An argument that a predictor reads: its name, its value in a call, its channels."""

    reads: str
    value: Any
    channels: int


def _is_read(value: Any, dims: int) -> bool:
    """Whether a predictor can read this: a map `[N, C, *spatial]`, or a list or dict of maps of as many images."""
    maps = maps_in(value)
    return bool(maps) and all(t.dim() == dims + 2 and t.shape[0] == maps[0].shape[0] for t in maps)


def _named(forward: Any, call: Call) -> dict[str, Any]:
    """A call's arguments by the names that :class:`~dyconvert.nn.handing.Handing` knows them by."""
    signature = inspect.signature(forward)
    try:
        bound = signature.bind(*call.args, **call.kwargs)
    except TypeError:
        return {}
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            named |= {f"{name}[{index}]": each for index, each in enumerate(value)}
        elif kind is inspect.Parameter.VAR_KEYWORD:
            named |= {f"{name}['{key}']": each for key, each in value.items()}
        else:
            named[name] = value
    return named


def _keeper(name: str, calls: dict[str, Call]) -> Any:
    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # In lists of their own: a dense block goes on appending to the one that it gave.
        calls.setdefault(name, Call(*map_tensors(lambda t: t, (args, kwargs))))

    return keep


def _made_up(values: Any, device: torch.device) -> Any:
    generator = torch.Generator("cpu").manual_seed(0)

    def make(t: Tensor) -> Tensor:
        if device.type == "meta" or not t.is_floating_point():
            return torch.zeros(t.shape, dtype=t.dtype, device=device)
        return torch.randn(t.shape, generator=generator, device="cpu").to(device, t.dtype)

    return map_tensors(make, values)


def _with_several_names(model: nn.Module) -> set[str]:
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return {name for group in names.values() if len(group) > 1 for name in group}
