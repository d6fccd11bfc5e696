"""Models that a file asks for, and not the user: which arguments it may give, and how large they may be.

A builder's arguments can name files that it unpickles, URLs that it downloads, and sizes that fill the memory. From a
checkpoint or a recipe only those are passed that shape an architecture.
"""

import math
from typing import TYPE_CHECKING, Any

from dyconvert.limits import ARGUMENT_ITEMS, CLASSES, INPUT_SIDE, WORD_CHARACTERS

if TYPE_CHECKING:
    from dyconvert.models.source import Source

# The largest number that each argument takes.
_SHAPE = {
    "num_classes": CLASSES,
    "dropout": 1,
    "drop_rate": 1,
    "attention_dropout": 1,
    "stochastic_depth_prob": 1,
    "width_mult": 16,
    "zero_init_residual": 1,
}
ARGUMENTS: dict[str, dict[str, float]] = {
    "builtin": {"num_classes": CLASSES, "width": 1024},
    "torchvision": {
        **_SHAPE,
        "aux_logits": 1,
        "aux_loss": 1,
        "transform_input": 1,
        "init_weights": 1,
        "memory_efficient": 1,
        "quantize": 1,
        "progress": 1,
        "image_size": INPUT_SIDE,
        "min_size": INPUT_SIDE,
        "max_size": INPUT_SIDE,
        "num_keypoints": 10_000,
        "trainable_backbone_layers": 6,
        "round_nearest": 256,
        "groups": 1024,
        "width_per_group": 1024,
        "replace_stride_with_dilation": 1,
        "growth_rate": 512,
        "bn_size": 64,
        "num_init_features": 2048,
    },
    "timm": {
        **_SHAPE,
        "in_chans": 4096,
        "img_size": INPUT_SIDE,
        "patch_size": 256,
        "output_stride": 32,
        "drop_path_rate": 1,
        "drop_block_rate": 1,
        "proj_drop_rate": 1,
        "attn_drop_rate": 1,
        "bn_momentum": 1,
        "bn_eps": 1,
        "features_only": 1,
        "out_indices": 64,
        "exportable": 1,
        "act_layer": 0,
        "norm_layer": 0,
        "global_pool": 0,
        "pad_type": 0,
        "aa_layer": 0,
        "cardinality": 256,
        "base_width": 1024,
        "stem_width": 1024,
        "stem_type": 0,
        "avg_down": 1,
        "channel_multiplier": 16,
    },
}
# Names of activations, norms and the like; never a path, a URL, or the name of something in a hub.
_WORDS = frozenset(
    ("act_layer", "norm_layer", "global_pool", "pad_type", "aa_layer", "stem_type"),
)


def untrusted(source: "Source") -> str | None:
    """The first argument of a library's builder that only the user may give, as `name=value`; None: there is none."""
    known = ARGUMENTS.get(source.specifier.partition(":")[0], {})
    for name, value in source.arguments.items():
        if name not in known or not _is_plain(value, known[name], name in _WORDS):
            shown = repr(value)
            return f"{name}={shown if len(shown) < 60 else shown[:60] + '...'}"
    if source.num_classes is not None and not 1 <= source.num_classes <= CLASSES:
        return f"num_classes={source.num_classes}"
    return None


def _is_plain(value: Any, largest: float, word: bool, deep: bool = True) -> bool:
    if isinstance(value, list | tuple):
        return deep and len(value) <= ARGUMENT_ITEMS and all(_is_plain(each, largest, word, False) for each in value)
    if isinstance(value, str):
        return word and value.isascii() and value.replace("_", "").isalnum() and len(value) <= WORD_CHARACTERS
    if isinstance(value, bool) or value is None:
        return True
    return isinstance(value, int | float) and math.isfinite(value) and abs(value) <= largest
