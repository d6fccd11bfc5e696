"""The tensors that a model returns, with names: those of a dict's keys and a dataclass's fields."""

import re
from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn

from dyconvert.outputs import tensors_in
from dyconvert.torch_internals.trees import tree_leaves

_PLAIN = (Tensor, bool, int, float, str, type(None))
_STEP = re.compile(r"\.(\w+)|\[(?:'([^']*)'|\"([^\"]*)\"|([^\]]*))\]")


class NamedOutputs(nn.Module):
    """A model that returns its tensors as one tuple, or one dict, whatever they stood in.

    torch.export takes no dataclass that wasn't registered with it, and ONNX's outputs are a list.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], as_dict: bool = False) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(names)
        self.as_dict = as_dict
        self.train(model.training)

    def forward(self, *arguments: Any) -> Any:
        tensors = [t for _, t in tensors_in(self.model(*arguments), numbers=False)]
        return dict(zip(self.names, tensors, strict=True)) if self.as_dict else tuple(tensors)


def output_names(returned: Any, taken: Collection[str] = ()) -> list[str]:
    """A name for each tensor in what a model returned: `"logits"`, `"boxes_0"`, or `"output"` where it has none.

    Args:
        taken: names that the inputs have.
    """
    tensors = tensors_in(returned, numbers=False)
    names: list[str] = []
    for path, _ in tensors:
        steps = [next(part for part in match if part) for match in _STEP.findall(path) if any(match)]
        name = "_".join(steps) or "output"
        if name[0].isdigit():
            name = f"output_{name}"
        while name in taken or name in names:
            name += "_out"
        names.append(name)
    return names


def is_plain(returned: Any) -> bool:
    """Whether torch.export can return this: tensors and plain values in containers that it knows."""
    return all(isinstance(leaf, _PLAIN) for leaf in tree_leaves(returned))
