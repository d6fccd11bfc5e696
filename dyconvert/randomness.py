"""The state of the random generators that a forward may draw from: torch's, numpy's and Python's own."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

State = tuple[Any, ...]


def random_state() -> State:
    """The present state of the global generators, those of CUDA devices in use included."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    return torch.get_rng_state(), cuda, np.random.get_state(), random.getstate()


def set_random_state(state: State) -> None:
    """Go back to what :func:`random_state` returned."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state_all(state[1])
    np.random.set_state(state[2])
    random.setstate(state[3])


def same_state(a: State, b: State) -> bool:
    """Whether nothing was drawn between two states."""
    return (
        torch.equal(a[0], b[0])
        and a[3] == b[3]
        and a[2][2:] == b[2][2:]
        and bool((a[2][1] == b[2][1]).all())
        and (a[1] is None or b[1] is None or all(torch.equal(x, y) for x, y in zip(a[1], b[1], strict=True)))
    )


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Whatever is drawn within, the generators go on after it as if nothing had been."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)
