"""The model card: README.md beside the weights, with the header that the Hugging Face Hub reads."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dyconvert.checkpoint.description import Description, describe
from dyconvert.console import count
from dyconvert.errors import CheckpointError
from dyconvert.files import write_file
from dyconvert.limits import CARD_BYTES, read_text
from dyconvert.marks import compression_of
from dyconvert.models.source import Source
from dyconvert.nn import CoefficientPredictor, DynamicConv

CARD = "README.md"
# The table's rows: the name of a figure, with its values before and after.
Figures = Mapping[str, tuple[float | None, float | None]]

_MARK = re.compile(r"\n<!-- Written by dyconvert; a card that was edited stays as it is\. ([0-9a-f]{16}) -->\n*\Z")
_LOADED = re.compile(r'dyconvert\.load\("[^"\n]*"')


def model_card(description: Description, figures: Figures, address: str) -> str:
    """The text of the card.

    Args:
        figures: rows of its table; whole numbers are counts, others percentages.
        address: the argument of `load`.
    """
    source = _source(description)
    lines = [*_header(description, source), "", f"# {_title(description, source)}", "", _summary(description, source)]
    if figures:
        lines += ["", "| | before | after |", "|---|---:|---:|"]
        lines += [
            f"| {_cell(name)} | {_number(before)} | {_number(after)} |" for name, (before, after) in figures.items()
        ]
    return signed("\n".join([*lines, "", *_loading(description, source, address), "", *_licence(source)]))


def write_card(directory: Path, figures: Figures) -> None:
    """Write the card of a saved model anew, with other figures. A card that a user wrote or edited stays.

    Raises:
        CheckpointError: no model was saved there, or the card can't be written.
    """
    if may_replace(directory):
        write_file(directory / CARD, model_card(describe(directory), figures, str(directory)), CheckpointError)


def counted(model: nn.Module) -> Figures:
    """The parameters of a converted model, and of the static model at the same width.

    Empty for a compressed model, whose parameters are other numbers than before.
    """
    if compression_of(model) is not None:
        return {}
    total = sum(p.numel() for p in model.parameters())
    predicting = {id(p) for m in model.modules() if isinstance(m, CoefficientPredictor) for p in m.parameters()}
    added = sum(p.numel() for p in model.parameters() if id(p) in predicting)
    seen: set[int] = set()
    for conv in (m for m in model.modules() if isinstance(m, DynamicConv)):
        for bank in (conv.weight, conv.bias):
            if bank is not None and id(bank) not in seen:
                seen.add(id(bank))
                added += bank.numel() - bank.numel() // conv.g
    return {"parameters": (total - added, total)}


def signed(text: str) -> str:
    """The text with the mark that shows that dyconvert wrote it."""
    return (
        f"{text}\n\n<!-- Written by dyconvert; a card that was edited stays as it is. {_digest(text + chr(10))} -->\n"
    )


def is_own(text: str) -> bool:
    """Whether dyconvert wrote the card, and nobody has edited it since."""
    match = _MARK.search(text)
    return match is not None and match[1] == _digest(text[: match.start()])


def may_replace(directory: Path) -> bool:
    """Whether a directory has no card, or one that dyconvert may replace."""
    file = directory / CARD
    if not os.path.lexists(file):
        return True
    try:
        return not file.is_symlink() and is_own(read_text(file, CARD_BYTES))
    except (OSError, ValueError):
        return False


def at_address(text: str, address: str) -> str:
    """The card with another address to load from; a card that dyconvert didn't write stays as it is."""
    mark = _MARK.search(text)
    if mark is None or not is_own(text):
        return text
    body = text[: mark.start()].removesuffix("\n")
    return signed(_LOADED.sub(lambda _: f"dyconvert.load({json.dumps(address)}", body))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _source(description: Description) -> Source | None:
    try:
        return None if description.source is None else Source.from_json(description.source)
    except (KeyError, TypeError, AttributeError, ValueError):
        return None


def _header(description: Description, source: Source | None) -> list[str]:
    lines = ["---", "library_name: dyconvert", "tags:", "- dynamic-convolution"]
    if description.plan is not None:
        lines.append(f"- {json.dumps(description.plan.method.name)}")
    if description.narrowing is not None:
        lines.append("- narrowed")
    if description.preprocessing is not None and description.preprocessing.classes is not None:
        lines.append("pipeline_tag: image-classification")
    library, _, name = source.specifier.partition(":") if source is not None else ("", "", "")
    if library == "timm" and source is not None and source.weights not in (None, "default") and _is_tag(source):
        lines.append(f"base_model: {json.dumps(f'timm/{name.partition(chr(46))[0]}.{source.weights}')}")
    if (licence := licence_of(source)) is not None:
        lines += [f"{key}: {json.dumps(value)}" for key, value in licence.items()]
    return [*lines, "---"]


def _is_tag(source: Source) -> bool:
    return re.fullmatch(r"[\w-]+", str(source.weights)) is not None


def licence_of(source: Source | None) -> dict[str, str] | None:
    """The licence of the original's weights, in the form of a card's header; None if it isn't known."""
    if source is None or source.weights is None or os.path.isabs(source.weights) or "/" in source.weights:
        return None
    library, _, name = source.specifier.partition(":")
    try:
        if library == "torchvision":
            from torchvision.models import get_model_weights

            chosen = get_model_weights(name).__members__.get(source.weights)
            link = chosen.meta.get("license") if chosen is not None else None
            if link:
                return {"license": "other", "license_name": "of-the-weights", "license_link": str(link)}
            return {"license": "bsd-3-clause"} if chosen is not None else None
        if library == "timm":
            from dyconvert.models.listing import import_timm

            tag = f".{source.weights}" if _is_tag(source) and "." not in name else ""
            cfg = import_timm().get_pretrained_cfg(name + tag, allow_unregistered=False)
            return {"license": str(cfg.license).lower()} if cfg is not None and cfg.license else None
        if source.specifier == "builtin:digits-resnet8":
            return {"license": "apache-2.0"}
    except Exception:  # a library that isn't installed, or doesn't know the model: the card has no licence
        return None
    return None


def _title(description: Description, source: Source | None) -> str:
    model = _named(source) if source is not None else "A model"
    if description.plan is not None:
        return f"{model}, {description.plan.method.name}, g = {description.plan.method.g}"
    return f"{model}, narrowed" if description.narrowing is not None else model


def _named(source: Source) -> str:
    head, colon, tail = source.specifier.rpartition(":")
    # Its folders are this machine's.
    head = os.path.basename(head.replace("\\", "/")) if head.endswith(".py") else head
    return _cell(f"{head}{colon}{tail}")


def _summary(description: Description, source: Source | None) -> str:
    original = "a static model" if source is None else f"`{_named(source)}`"
    if source is not None and source.weights is not None:
        weights = os.path.basename(source.weights.replace("\\", "/"))
        original += f" with the weights `{_cell(weights)}`"
    sentences = []
    if description.narrowing is not None:
        macs = description.narrowing.macs
        to = f" to {100 * macs:.0f} % of its multiply-adds" if macs is not None else ""
        sentences.append(f"Made from {original}, narrowed{to}.")
    if description.plan is not None:
        plan = description.plan
        start = "Its" if sentences else f"Made from {original}: its"
        sentences.append(
            f"{start} {len(plan.converted)} converted convolutions keep g = {plan.method.g} weight sets each, which "
            f"are mixed for every image by predicted coefficients ({_cell(plan.method.title or plan.method.name)})."
        )
        if plan.method.paper:
            sentences.append(f"Method: {_cell(plan.method.paper)}.")
    if description.compression is not None:
        sentences.append(f"It is {description.compression}, and for inference only.")
    return " ".join(sentences) or f"A static model, saved as a control: {original}."


def _loading(description: Description, source: Source | None, address: str) -> list[str]:
    needs_model = source is None or source.needs_trust
    more = ", model=static" if needs_model else ""
    lines = ["```python", "import dyconvert", ""]
    if needs_model:
        static = f"the model of {_named(source)}" if source is not None else "the static model that it was made from"
        lines.append(f"static = ...  # {static}; with any weights")
    lines.append(f"model = dyconvert.load({json.dumps(address)}{more})")
    if description.preprocessing is not None:
        lines += [
            'images = dyconvert.preprocessing(model).batch(["image.jpg"])',
            "probabilities = model(images).softmax(1)",
        ]
    return [*lines, "```"]


def _licence(source: Source | None) -> list[str]:
    licence = licence_of(source)
    if licence is None:
        return [
            "The licence of the original's weights isn't known to dyconvert: say here under which one this model is."
        ]
    name = licence.get("license_link", licence["license"])
    return [f"Licence of the original's weights, as its library gives it: {_cell(name)}."]


def _cell(text: str) -> str:
    """Foreign text on one line, without characters that have a meaning in Markdown or HTML."""
    return re.sub(r"[\x00-\x1f\x7f|`<>\[\]]", " ", text.encode("utf-8", "replace").decode())[:200].strip()


def _number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else count(value)
