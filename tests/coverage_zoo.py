"""Models of four libraries, by the libraries' own lists: each with random weights and a small input.

A case is `library:name`, as `torchvision:resnet18`. timm's are one or more for each of its modules, which
`timm_families.json` has; `python tests/make_coverage.py --families` writes that file.
"""

import functools
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
import zoo
from torch import Tensor, nn

FAMILIES = Path(__file__).with_name("timm_families.json")
NEEDS = {"torchvision": "torchvision", "timm": "timm", "smp": "segmentation_models_pytorch", "hf": "transformers"}

# More parameters would be tens of gigabytes of float64 experts, and larger images hours: planned and converted on
# the meta device only. The work is parameters times pixels.
TOO_LARGE = 150e6
TOO_MUCH_WORK = 2e9 * 64**2
# From here on, three experts instead of six.
LARGE = 25e6

# The sizes that are tried for timm's models, smallest first.
SIZES = (64, 96, 128, 160, 192, 224, 240, 256, 288, 320, 384, 448, 512)

HF = {
    "resnet": ("ResNet", {"embedding_size": 8, "hidden_sizes": [16, 24, 32, 40], "depths": [2, 1, 1, 2]}),
    "convnext": ("ConvNext", {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}),
    "mobilenet_v2": ("MobileNetV2", {"depth_multiplier": 0.35}),
    "regnet": (
        "RegNet",
        {"embedding_size": 8, "hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 2, 1], "groups_width": 8},
    ),
}


def is_installed(library: str) -> bool:
    return importlib.util.find_spec(NEEDS[library]) is not None


def torchvision_names() -> list[str]:
    return torchvision.models.list_models()


def timm_names() -> list[str]:
    return [entry["model"] for entry in timm_families()]


@functools.cache
def timm_families() -> list[dict[str, Any]]:
    """timm's modules, each with its smallest model; and for each class of conv that they lack, the smallest with it."""
    return json.loads(FAMILIES.read_text())


def smp_names() -> list[str]:
    import segmentation_models_pytorch as smp

    # DPT is for vision transformers, and refuses a ResNet.
    return sorted(set(smp.MODEL_ARCHITECTURES_MAPPING) - {"dpt"})


def names(library: str) -> list[str]:
    """Every model of the library that is looked at, as `library:name`."""
    lists = {"torchvision": torchvision_names, "timm": timm_names, "smp": smp_names, "hf": lambda: list(HF)}
    return [f"{library}:{name}" for name in lists[library]()]


@functools.cache
def parameters(case: str) -> int:
    """How many the model has."""
    library, name = case.split(":")
    if library == "timm":
        return _entry(name)["parameters"]
    return sum(p.numel() for p in build_on_meta(case).parameters())


def build_on_meta(case: str) -> nn.Module:
    try:
        with torch.device("meta"):
            return build(case)
    except NotImplementedError:  # it computes its widths with tensors
        return build(case).to("meta")


def is_too_large(case: str) -> bool:
    """Whether it is only planned."""
    library, name = case.split(":")
    return parameters(case) > TOO_LARGE or (library == "timm" and timm_work(_entry(name)) > TOO_MUCH_WORK)


def timm_work(entry: dict[str, Any]) -> int:
    return entry["parameters"] * entry["size"] ** 2


def _entry(name: str) -> dict[str, Any]:
    return next(entry for entry in timm_families() if entry["model"] == name)


def is_detection(case: str) -> bool:
    return any(part in case for part in ("rcnn", "retinanet", "fcos", "torchvision:ssd"))


def build(case: str) -> nn.Module:
    """In eval mode, on the current default device, with random weights of which none are zero throughout."""
    library, name = case.split(":")
    torch.manual_seed(0)
    model = {"torchvision": zoo.build, "timm": _timm, "smp": _smp, "hf": _hf}[library](name)
    if is_detection(case):
        _make_small(model)
    # A residual branch whose last scale starts at zero, or a head that does, would hide what is wrong before it.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.device.type != "meta" and p.numel() and not p.count_nonzero():
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


def _timm(name: str) -> nn.Module:
    import timm

    return timm.create_model(name)


def _smp(name: str) -> nn.Module:
    import segmentation_models_pytorch as smp

    return smp.create_model(name, encoder_name="resnet18", encoder_weights=None, classes=3)


def _hf(name: str) -> nn.Module:
    import transformers

    kind, settings = HF[name]
    config = getattr(transformers, f"{kind}Config")(**settings, return_dict=True)
    return getattr(transformers, f"{kind}ForImageClassification")(config)


def _make_small(model: nn.Module) -> None:
    """Images as small as the model allows; few boxes, but kept whatever their score, so that there are some."""
    transform = model.transform
    if transform.fixed_size is None:
        transform.min_size, transform.max_size = (128,), 160
    for module in model.modules():
        for attribute in ("score_thresh", "box_score_thresh"):
            if hasattr(module, attribute):
                setattr(module, attribute, 0.0)
        for attribute in ("detections_per_img", "topk_candidates"):
            if hasattr(module, attribute):
                setattr(module, attribute, 20)
        if hasattr(module, "_post_nms_top_n"):
            module._post_nms_top_n = {"training": 50, "testing": 50}


def inputs(case: str, batch: int, dtype: torch.dtype, seed: int = 0) -> tuple[Any, ...]:
    """The arguments of the model's forward: images as small as it takes."""
    library, name = case.split(":")
    generator = torch.Generator().manual_seed(seed)

    def images(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    if is_detection(case):
        return ([torch.rand(3, 128, 160, generator=generator, dtype=torch.float64).to(dtype) for _ in range(batch)],)
    if "raft" in case:
        return images(batch, 3, 128, 128), images(batch, 3, 128, 128), 2
    if library == "torchvision":
        size = 224 if name.startswith(("vit", "swin")) and "3d" not in name else None
        return (images(batch, 3, size, size) if size else zoo.images(name, batch, dtype, seed),)
    if library == "timm":
        entry = _entry(name)
        return (images(batch, entry["channels"], entry["size"], entry["size"]),)
    size = 128 if case == "smp:pan" else 64  # it pools a 32nd of it by eight
    return (images(batch, 3, size, size),)


def example(case: str, dtype: torch.dtype) -> tuple[Any, ...] | None:
    """What to plan with: None, and dyconvert takes a common size, or this where that can't be guessed."""
    library, _ = case.split(":")
    if is_detection(case) or "raft" in case:
        return inputs(case, 1, dtype)
    if library == "hf":
        return (torch.empty(1, 3, 224, 224, dtype=dtype, device="meta"),)
    return None


def choose_families() -> Iterator[dict[str, Any]]:
    """What `timm_families.json` is to hold, from timm's registry. Builds a thousand models, on the meta device."""
    import timm

    smallest: dict[str, dict[str, Any]] = {}
    for module in timm.list_modules():
        for name in timm.list_models(module=module):
            try:
                model = _timm_on_meta(name)
            except Exception as error:  # it needs one more package, or real tensors
                print(f"{name}: {error}")
                continue
            convs = [m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)]
            entry = {
                "module": module,
                "model": name,
                "parameters": sum(p.numel() for p in model.parameters()),
                "stem_only": all(conv.in_channels <= 4 for conv in convs),
            }
            keys = {f"class {type(conv).__name__}" for conv in convs}
            if convs:
                keys.add(f"{module}, stem only" if entry["stem_only"] else module)
            for key in keys:
                if key not in smallest or entry["parameters"] < smallest[key]["parameters"]:
                    smallest[key] = entry
    chosen = {
        entry["model"]: entry
        for key, entry in smallest.items()
        # The conv that makes the patches isn't what a family is chosen for, if it has others.
        if not (key.endswith(", stem only") and entry["module"] in smallest)
    }
    for entry in sorted(chosen.values(), key=lambda entry: (entry["module"], entry["model"])):
        model = _timm_on_meta(entry["model"])
        config = model.pretrained_cfg
        channels, size, _ = config["input_size"]
        smaller = [] if config.get("fixed_input_size") else [s for s in SIZES if s < size and _fits(model, s)]
        # The meta device lets some shapes pass.
        if smaller and not _fits(_timm(entry["model"]).eval(), smaller[0]):
            smaller = []
        yield {**entry, "channels": channels, "size": min([*smaller, size])}


def _timm_on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return _timm(name).eval()


def _fits(model: nn.Module, size: int) -> bool:
    try:
        with torch.no_grad():
            model(torch.zeros(2, 3, size, size, device=next(model.parameters()).device))
    except Exception:
        return False
    return True
