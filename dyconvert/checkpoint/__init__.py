"""save and load: a directory with `model.safetensors` and `dyconvert.json`, and no pickle."""

from dyconvert.checkpoint.description import DESCRIPTION, Description, describe, source_of
from dyconvert.checkpoint.loading import load
from dyconvert.checkpoint.saving import check_writable, save

__all__ = ["DESCRIPTION", "Description", "check_writable", "describe", "load", "save", "source_of"]
