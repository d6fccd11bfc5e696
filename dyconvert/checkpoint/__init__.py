"""save and load: a directory with `model.safetensors`, `dyconvert.json` and a card, and no pickle; the Hub."""

from dyconvert.checkpoint.card import write_card
from dyconvert.checkpoint.description import DESCRIPTION, Description, describe, source_of
from dyconvert.checkpoint.hub import is_address, local, push
from dyconvert.checkpoint.loading import load
from dyconvert.checkpoint.saving import check_writable, save

__all__ = [
    "DESCRIPTION",
    "Description",
    "check_writable",
    "describe",
    "is_address",
    "load",
    "local",
    "push",
    "save",
    "source_of",
    "write_card",
]
