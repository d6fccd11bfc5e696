"""timm's models, whose pretrained weights are named by a tag."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dyconvert.errors import ModelError
from dyconvert.models.building import call, unknown_weights
from dyconvert.models.listing import import_timm, unknown_model
from dyconvert.models.source import Source
from dyconvert.models.weights import load_state_dict_into, read_state_dict


def timm_model(name: str, weights: str | Path, arguments: dict[str, Any], load: bool) -> tuple[nn.Module, Source]:
    """Make a model of timm; give it `weights`, a name or a Path, unless `load` is False."""
    timm = import_timm()
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        raise unknown_model(base)
    specifier, recorded = f"timm:{name}", str(weights) if isinstance(weights, Path) else None
    pretrained = isinstance(weights, str) and weights != "none"
    if pretrained and weights != "default":
        if tag not in ("", weights):
            raise ModelError(f"timm:{name} already names its weights, but {weights!r} are asked for; name one.")
        tag = str(weights)
    full_name = f"{base}.{tag}" if tag else base
    tags = [each.partition(".")[2] for each in timm.list_pretrained(f"{base}.*")]
    if (tag and tag not in tags) or (pretrained and not timm.is_model_pretrained(full_name)):
        raise unknown_weights(f"timm:{base}", tag or "default", tags)
    cfg = timm.get_pretrained_cfg(full_name)
    if pretrained:
        specifier, recorded = f"timm:{base}", cfg.tag or "default"
    if pretrained and load:
        url = f"https://huggingface.co/{cfg.hf_hub_id}" if cfg.hf_hub_id else cfg.url
        model = call(specifier, timm.create_model, arguments, url, model_name=full_name, pretrained=True)
    else:
        model = call(specifier, timm.create_model, arguments, model_name=full_name, pretrained=False)
    if load and isinstance(weights, Path):
        load_state_dict_into(model, read_state_dict(weights), weights)
    return model, Source(specifier, arguments, recorded, _input_size(cfg, arguments))


def _input_size(cfg: Any, arguments: Mapping[str, Any]) -> tuple[int, ...] | None:
    if cfg is None or cfg.input_size is None:
        return None
    channels, *sides = cfg.input_size
    size = arguments.get("img_size", sides)
    height, width = (size, size) if isinstance(size, int) else size
    return (arguments.get("in_chans", channels), height, width)
