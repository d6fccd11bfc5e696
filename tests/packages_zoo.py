"""Models of packages that pip installs, small and with random weights, from the table `packages.yaml`.

A case is `package:name`, as `monai:dynunet`; `packages.txt` lists what to install. In the table, a model has

- `make`: a class or function, `module:name`, called with what stands under `args` and `with`, where another model or a
  configuration may be made in the same way, and `{name: module:Class}` is a class itself; or only a `part` of it;
- `takes`: the arguments of its forward: the shape of one image, `[3, 64, 64]`; `{below: 1000}` for whole numbers, one
  an image or of a `shape` of their own; `{each: 20}` for the same number for each image; `{list: ...}` of such.
"""

import functools
import importlib
import importlib.util
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

TABLE = Path(__file__).with_name("packages.yaml")


@functools.cache
def table() -> dict[str, dict[str, Any]]:
    return yaml.safe_load(TABLE.read_text())


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def names() -> list[str]:
    """Every model of the table, installed or not; the packages in turn, so that a part of a sweep has seen them all."""
    rows = [[f"{package}:{name}" for name in models] for package, models in table().items()]
    return [case for turn in zip_longest(*rows) for case in turn if case]


def entry(case: str) -> dict[str, Any]:
    package, _, name = case.partition(":")
    return table()[package][name]


def build(case: str, seed: int = 0) -> nn.Module:
    """In eval mode, with random weights of which none are zero throughout."""
    torch.manual_seed(seed)
    model = _made(entry(case))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.requires_grad_(p.is_floating_point())
            # A residual branch whose last scale starts at zero, or a head that does, would hide what is wrong before.
            if p.numel() and not p.count_nonzero():
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    model.eval()
    return model


def _made(wanted: Any) -> Any:
    if not (isinstance(wanted, dict) and {"make", "name"} & set(wanted)):
        return wanted
    module, _, name = wanted.get("make", wanted.get("name")).partition(":")
    function = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    if "name" in wanted:
        return function
    options = {key: _made(value) for key, value in wanted.get("with", {}).items()}
    made = function(*map(_made, wanted.get("args", ())), **options)
    return functools.reduce(getattr, wanted["part"].split("."), made) if "part" in wanted else made


def inputs(case: str, batch: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Any, ...]:
    """The forward's arguments for so many images."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(wanted: Any) -> Any:
        if isinstance(wanted, list):
            return torch.randn(batch, *wanted, generator=generator, dtype=torch.float64).to(dtype)
        if isinstance(wanted, dict) and "below" in wanted:
            return torch.randint(wanted["below"], (batch, *wanted.get("shape", ())), generator=generator)
        if isinstance(wanted, dict) and "each" in wanted:
            return torch.full((batch,), wanted["each"])
        if isinstance(wanted, dict) and "list" in wanted:
            return [drawn(each) for each in wanted["list"]]
        return wanted

    return tuple(drawn(wanted) for wanted in entry(case)["takes"])


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in what a model returned: of lists, dicts and the attributes of other objects."""
    if isinstance(value, Tensor):
        return [value]
    if value is None or isinstance(value, nn.Module | str | bytes | int | float | torch.device | torch.dtype):
        return []
    if isinstance(value, dict):
        children = list(value.values())
    else:
        children = list(value) if isinstance(value, list | tuple) else list(getattr(value, "__dict__", {}).values())
    return [t for child in children for t in tensors(child)]
