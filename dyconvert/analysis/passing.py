"""One pass of a model, and of the original beside it, over images: coefficients, feature maps and top-1 together."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from dyconvert.analysis.accuracy import Accuracy, accuracy
from dyconvert.analysis.coefficient_statistics import CoefficientStatistics
from dyconvert.analysis.coefficients import Coefficients
from dyconvert.analysis.correlation import LayerCorrelation, MapCorrelation
from dyconvert.copying import in_eval_mode, skeleton
from dyconvert.errors import ModelError, brief, some
from dyconvert.nn import DynamicConv
from dyconvert.surgery.watch import arguments_of, watch_mixtures


class Seen(BaseModel):
    """The results of a pass.

    Attributes:
        images: how many were seen.
        shape: of a batch's images, `[C, H, W]`.
        accuracy: where the images' classes are the model's outputs.
    """

    images: int
    shape: list[int]
    accuracy: Accuracy | None
    coefficients: Coefficients | None
    correlations: list[LayerCorrelation]


def check_finite(model: nn.Module, name: str) -> None:
    """Refuse a model with NaN or infinity in its weights, and name them.

    Raises:
        ModelError: which tensors, and how many of their numbers.
    """
    broken = []
    for key, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.is_meta:
            count = int((~tensor.isfinite()).sum())
            if count:
                broken.append(f"{key} ({count} of {tensor.numel()})")
    if broken:
        raise ModelError(
            f"{name} holds NaN or infinity in {some(broken)}. Nothing about it can be measured; load weights from "
            "before the training diverged."
        )


def pass_over(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    against: nn.Module | None = None,
    layers: dict[str, str] | None = None,
    classes: Sequence[str] = (),
    count: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Seen:
    """Run `model`, and `against` beside it, in eval mode over batches, and collect statistics as they come.

    Args:
        model: converted or not; left as it is.
        batches: `(images, labels)`, or what :func:`~dyconvert.collapse` takes; a batch is seen and let go.
        layers: names of the layers whose feature maps are correlated, and why each was chosen.
        classes: the names of the classes that labels number.
        count: how many images there will be, if that is known.
        progress: called with how many images are done.

    Raises:
        ModelError: there is no batch, a model rejects one, or coefficients aren't finite.
    """
    models = {"model": model} | ({"original": against} if against is not None else {})
    runners = {key: in_eval_mode(skeleton(each, lambda t: t.detach())) for key, each in models.items()}
    statistics = None
    if any(isinstance(m, DynamicConv) for m in runners["model"].modules()):
        statistics = CoefficientStatistics(runners["model"], classes)
        watch_mixtures(runners["model"], statistics.see)
    maps = {key: _watch_maps(runner, layers or {}, count) for key, runner in runners.items()}
    predicted: dict[str, list[Tensor]] = {key: [] for key in (*runners, "labels")}
    scored = True
    done, shape = 0, []
    with torch.inference_mode():
        for batch in batches:
            labels = batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
            labels = (
                labels if isinstance(labels, Tensor) and labels.dim() == 1 and not labels.is_floating_point() else None
            )
            args, kwargs = arguments_of(runners["model"], batch)
            images = args[0] if args else next(iter(kwargs.values()))
            shape = list(images.shape[1:])
            for key, runner in runners.items():
                if key == "model" and statistics is not None:
                    statistics.begin(labels if labels is not None else torch.full((len(images),), -1), done)
                returned = _called(runner, args, kwargs)
                ours = _predicted(returned, labels, len(classes)) if scored else None
                scored = ours is not None
                predicted[key] += [] if ours is None else [ours]
            predicted["labels"] += [labels.cpu()] if scored and labels is not None else []
            done += len(images)
            if progress is not None:
                progress(done)
    if not done:
        raise ModelError(
            "The data holds no batch, so there is nothing to see. An iterator that was used up gives none."
        )
    correlations = []
    for layer, why in (layers or {}).items():
        correlation = maps["model"][layer].result() if layer in maps["model"] else None
        if correlation is not None:
            other = maps.get("original", {}).get(layer)
            correlations.append(
                LayerCorrelation(layer=layer, why=why, model=correlation, original=other.result() if other else None)
            )
    return Seen(
        images=done,
        shape=shape,
        accuracy=_accuracy({key: torch.cat(each) for key, each in predicted.items()}, classes) if scored else None,
        coefficients=statistics.result() if statistics is not None else None,
        correlations=correlations,
    )


def _called(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return model(*args, **kwargs)
    except ModelError:
        raise
    except Exception as error:
        shapes = ", ".join("x".join(map(str, t.shape)) for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
        raise ModelError(
            f"{type(model).__name__} rejects the images ({shapes}): {brief(error)}. Give an input of the size that "
            "it takes: `example=...`."
        ) from error


def _watch_maps(model: nn.Module, layers: dict[str, str], count: int | None) -> dict[str, MapCorrelation]:
    correlations = {}
    modules = dict(model.named_modules())
    for layer in layers:
        if layer in modules:
            correlations[layer] = collector = MapCorrelation(count)

            def see(_: nn.Module, args: Any, output: Any, collector: MapCorrelation = collector) -> None:
                if isinstance(output, Tensor) and output.dim() > 1:
                    collector.add(output)

            modules[layer].register_forward_hook(see)
    return correlations


def _predicted(returned: Any, labels: Tensor | None, classes: int) -> Tensor | None:
    """The classes that the images are taken for; None where the outputs aren't the classes of the images."""
    if not isinstance(returned, Tensor) or labels is None or returned.dim() != 2 or returned.shape[1] != classes:
        return None
    if len(returned) != len(labels) or (labels < 0).any():
        return None
    return returned.argmax(1).cpu()


def _accuracy(predicted: dict[str, Tensor], classes: Sequence[str]) -> Accuracy:
    return accuracy(predicted["labels"], predicted["model"], predicted.get("original"), classes)
