"""A trial run of the user's model: whatever it changes is put back."""

import copy
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dyconvert.closures import variables_in
from dyconvert.randomness import kept_random_state
from dyconvert.torch_internals.trees import tree_map_only


@contextmanager
def kept(*models: nn.Module) -> Iterator[None]:
    """Put the models' modes, buffers and attributes back, and the global generators.

    Attributes are put back to the objects that they were; lists, dicts and sets among them to what they held,
    generators of random numbers to where they stood, and the variables that functions among them close over.
    Parameters aren't copied: a forward that writes into one is not undone.
    """
    with kept_random_state(), ExitStack() as stack:
        for model in models:
            stack.enter_context(_kept(model))
        yield


@contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    modules = list(model.modules())
    modes = [module.training for module in modules]
    states = [{name: (each, _contents(each)) for name, each in vars(module).items()} for module in modules]
    variables = [(cell, cell.cell_contents, _contents(cell.cell_contents)) for cell in variables_in(model)]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        if model.training != modes[0]:
            # A module's own train() may do more than set the switch: loralib's merges weights.
            model.train(modes[0])
        for module, training, state in zip(modules, modes, states, strict=True):
            for name in vars(module).keys() - state.keys():
                del vars(module)[name]
            for name, (value, contents) in state.items():
                if name not in vars(module) or vars(module)[name] is not value:
                    vars(module)[name] = value
                _refill(value, contents)
            module.training = training
        for cell, value, contents in variables:
            cell.cell_contents = value
            _refill(value, contents)
        with torch.no_grad():
            for buffer, values in buffers:
                if not buffer.is_meta and not torch.equal(buffer, values):
                    buffer.data.copy_(values)


# How a generator of random numbers tells its state and takes it back.
_GENERATORS: tuple[tuple[type, Callable[[Any], Any], Callable[[Any, Any], Any]], ...] = (
    (torch.Generator, torch.Generator.get_state, torch.Generator.set_state),
    (random.Random, random.Random.getstate, random.Random.setstate),
    (np.random.RandomState, np.random.RandomState.get_state, np.random.RandomState.set_state),
    (
        np.random.Generator,
        lambda generator: generator.bit_generator.state,
        lambda generator, state: setattr(generator.bit_generator, "state", state),
    ),
)


def _contents(value: Any) -> Any:
    if type(value) in (list, dict, set, OrderedDict):  # a subclass may do anything when it is filled
        return value.copy()
    return next((get(value) for kind, get, _ in _GENERATORS if isinstance(value, kind)), None)


def _refill(value: Any, contents: Any) -> None:
    for kind, _, put in _GENERATORS:
        if isinstance(value, kind):
            put(value, contents)
            return
    if contents is None or (len(value) == len(contents) and _same(value, contents)):
        return
    value.clear()
    value.extend(contents) if isinstance(value, list) else value.update(contents)


def _same(value: Any, contents: Any) -> bool:
    if isinstance(value, set):
        return value == contents
    if isinstance(value, dict):
        return all(key in contents and each is contents[key] for key, each in value.items())
    return all(a is b for a, b in zip(value, contents, strict=True))


def fresh(value: Any) -> Any:
    """A copy of an example with tensors of its own, outside of any graph of gradients."""
    value = tree_map_only(Tensor, lambda t: t.detach().clone(), value)
    try:
        return copy.deepcopy(value)
    except Exception:  # an object of the user's that can't be copied is given as it is
        return value
