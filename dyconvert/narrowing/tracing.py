"""A run that is traced: torch-pruning's dependency graph of it, and what hooks see in it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dyconvert.copying import clear_hooks, on_meta, skeleton
from dyconvert.errors import DyconvertError, ModelError, brief
from dyconvert.narrowing import torch_pruning_bridge as bridge
from dyconvert.narrowing.flow import is_layer
from dyconvert.narrowing.graph import Layer
from dyconvert.narrowing.obstacles import Obstacles, Padding, follow_padding
from dyconvert.torch_internals.modules import ConvNd
from dyconvert.torch_internals.trees import tree_flatten, tree_map_only


class Watch:
    """The layers and paddings of a run that is traced, as hooks see them."""

    def __init__(self, model: nn.Module, image_channels: int, images: int) -> None:
        self.layers: dict[str, Layer] = {}
        self.small: set[str] = set()
        self.paddings: dict[str, Padding] = {}
        self.stems: set[str] = set()
        self._shortcuts: dict[Any, tuple[str, nn.Module]] = {}
        self._image_channels = image_channels
        self._images = images
        self._handles = [m.register_forward_hook(self._hook(name)) for name, m in model.named_modules()]

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not isinstance(output, Tensor):
                return
            if is_layer(module):
                channels = module.out_channels if isinstance(module, ConvNd) else module.out_features
                positions = output.numel() // (channels * self._images)
                depthwise = isinstance(module, ConvNd) and module.groups == module.in_channels == module.out_channels
                layer = self.layers.setdefault(name, Layer(name, 0, module.weight.numel(), depthwise))
                layer.positions += positions
                if layer.positions == 1:
                    self.small.add(name)
                if isinstance(module, ConvNd) and module.in_channels == self._image_channels <= 4:
                    self.stems.add(name)
            elif next(module.parameters(), None) is None and output.grad_fn is not None:
                self._shortcuts[output.grad_fn] = name, module

        return hook

    def padding(self, grad_fn: Any, before: int, after: int) -> str | None:
        """Note that a module without parameters pads channels; its name, or None if it is no such module."""
        if grad_fn not in self._shortcuts:
            return None
        name = self._shortcuts[grad_fn][0]
        self.paddings[name] = Padding(before, after)
        return name

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


@dataclass
class Traced:
    """A run that was traced.

    Attributes:
        runner: the copy that ran.
        graph: torch-pruning's.
        watch: the layers that hooks saw.
        obstacles: the operators that mix channels.
    """

    runner: nn.Module
    graph: bridge.DependencyGraph
    watch: Watch
    obstacles: Obstacles


def trace(model: nn.Module, example: tuple[Any, ...]) -> Traced:
    """Trace a run of a copy of a model.

    The copy is on the meta device unless the forward looks at values; it trains if training has layers of its own.

    Raises:
        ModelError: the model rejects the example, or torch-pruning can't follow it.
    """
    try:
        runner, arguments = on_meta(model), tree_map_only(Tensor, _on_meta, example)
        traced = _trace(runner, arguments)
        # Auxiliary heads are part of training only, and read channels that are narrowed.
        layers = {name for name, m in runner.named_modules() if is_layer(m)}
        if (layers - traced.watch.layers.keys()) & _called_in_training(runner, arguments):
            traced = _trace(runner, arguments, training=True)
    except DyconvertError:
        raise
    except (NotImplementedError, RuntimeError):
        # Control flow that looks at values needs a real run.
        runner = skeleton(model, lambda t: t.detach())
        try:
            traced = _trace(runner, example)
        except DyconvertError:
            raise
        except Exception as error:
            raise ModelError(
                f"{type(model).__name__} can't be narrowed: {brief(error)}. Pass an example that its forward "
                "takes: `example=...`."
            ) from error
    except Exception as error:
        raise ModelError(f"{type(model).__name__} can't be followed by torch-pruning: {brief(error)}.") from error
    return traced


def _on_meta(t: Tensor) -> Tensor:
    t = t.detach().to("meta")
    # A batch norm can't be trained on one image.
    return t if t.dim() < 2 or t.shape[0] > 1 else t.expand(2, *t.shape[1:])


def _called_in_training(model: nn.Module, arguments: tuple[Any, ...]) -> set[str]:
    """The layers that a forward in training mode calls; none where it fails, as it may on the meta device."""
    called: set[str] = set()
    handles = [m.register_forward_hook(lambda *_, name=name: called.add(name)) for name, m in model.named_modules()]
    try:
        with torch.no_grad():
            model.train()(*arguments)
    except Exception:
        return set()
    finally:
        for handle in handles:
            handle.remove()
        model.eval()
    return called


def _trace(runner: nn.Module, arguments: tuple[Any, ...], training: bool = False, unused: Sequence[str] = ()) -> Traced:
    """Trace a run.

    Args:
        unused: layers that reach no output: theirs are traced as if the model returned them, for their inputs are
            narrowed with what makes them.
    """
    clear_hooks(runner)
    for p in runner.parameters():
        p.requires_grad_(p.is_floating_point() or p.is_complex())
    tensors = [leaf for leaf in tree_flatten(arguments)[0] if isinstance(leaf, Tensor)]
    listed = bool(arguments) and isinstance(arguments[0], list)
    images = len(arguments[0]) if listed else len(tensors[0]) if tensors and tensors[0].dim() else 1
    channels = tensors[0].shape[0 if listed else 1] if tensors and tensors[0].dim() > 2 else 0
    watch = Watch(runner, channels, max(images, 1))
    obstacles = Obstacles(runner)
    returned: list[Tensor] = []
    handles = [runner.get_submodule(name).register_forward_hook(_keeper(returned)) for name in unused]
    try:
        with torch.enable_grad():
            graph = bridge.dependency_graph(runner, arguments, training, obstacles.mend, returned)
    finally:
        watch.remove()
        for handle in handles:
            handle.remove()
    followed = {id(node.module) for node in bridge.nodes(graph)}
    rest = [name for name in watch.layers if id(runner.get_submodule(name)) not in followed]
    if rest and not unused:
        return _trace(runner, arguments, training, rest)
    follow_padding(graph, obstacles, watch.padding)
    return Traced(runner, graph, watch, obstacles)


def _keeper(returned: list[Tensor]) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            returned.append(output)

    return hook
