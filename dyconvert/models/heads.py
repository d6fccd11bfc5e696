"""New heads: the same network for another number of classes."""

from torch import nn

from dyconvert.errors import ModelError


def replace_head(model: nn.Module, num_classes: int | None, *, always: bool = False) -> None:
    """Give `model`, in place, a new last layer with `num_classes` outputs, unless it has that number.

    The head is the last linear, or 1x1 conv with bias, of the model. Auxiliary heads, which are layers of the same
    kind with the same number of outputs, are replaced as well. New layers start as torch starts them.

    Args:
        num_classes: None keeps the number.
        always: replace a head with that number as well.

    Raises:
        ModelError: the model's last layer is neither.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    if not layers or not _is_head(layers[-1][1]):
        last = f"its last one, {layers[-1][0]}, is a {type(layers[-1][1]).__name__}" if layers else "it has none"
        raise ModelError(
            f"{type(model).__name__} can't get a new head: its last layer would have to be a linear or a 1x1 conv "
            f"with bias, and {last}. Give the model's own argument for it instead, or a factory that builds the head."
        )
    head = layers[-1][1]
    old = _outputs(head)
    num_classes = num_classes or old
    if old == num_classes and not always:
        return
    for name, module in layers:
        if type(module) is type(head) and _is_head(module) and _outputs(module) == old:
            model.set_submodule(name, _like(module, num_classes))
    # timm's models say their number of classes; others may too.
    if getattr(model, "num_classes", None) == old:
        model.num_classes = num_classes  # type: ignore[assignment]  # torch expects tensors and modules alone


def find_head(model: nn.Module) -> str | None:
    """The name of the last layer of a static model, if it is a linear or a 1x1 conv with bias."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    return layers[-1][0] if layers and _is_head(layers[-1][1]) else None


def _is_head(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return True
    return module.kernel_size == (1, 1) and module.bias is not None and module.groups == 1


def _outputs(module: nn.Module) -> int:
    return module.out_features if isinstance(module, nn.Linear) else module.out_channels


def _like(module: nn.Module, outputs: int) -> nn.Module:
    ours = {"device": module.weight.device, "dtype": module.weight.dtype}
    if isinstance(module, nn.Linear):
        new: nn.Module = nn.Linear(module.in_features, outputs, module.bias is not None, **ours)
    else:
        new = nn.Conv2d(module.in_channels, outputs, 1, module.stride, module.padding, **ours)
    return new.train(module.training)
