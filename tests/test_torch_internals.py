"""Each use of torch's private API, in the version that is installed."""

import torch

from dyconvert.torch_internals import DispatchMode, multiplies_bfloat16, without_modes


class Names(DispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_operators_but_for_those_without_modes():
    with Names() as mode:
        x = torch.ones(2)
        with without_modes():
            x = x * 3
        x = x + 1
    assert mode.names == ["ones.default", "add.Tensor"]
    assert x.tolist() == [4.0, 4.0]


def test_whether_a_processor_multiplies_bfloat16():
    assert multiplies_bfloat16() in (True, False)
