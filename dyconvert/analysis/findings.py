"""What an analysis shows, in sentences: what stands out, good or bad, and what to do about it."""

from typing import Literal

from pydantic import BaseModel

from dyconvert.analysis.coefficients import CONSTANT, MOSTLY, UNUSED, Coefficients, ConvCoefficients
from dyconvert.analysis.correlation import SAME, LayerCorrelation
from dyconvert.errors import some

# Below it a coefficient's standard deviation is a matter of rounding.
UNTRAINED = 1e-6


class Finding(BaseModel):
    """One sentence or two; a "warning" is something to look into, a "note" something to know."""

    level: Literal["warning", "note"]
    text: str


def of_coefficients(found: Coefficients) -> list[Finding]:
    """Experts that are never used, predictors that are saturated or predict a constant."""
    findings = []
    constant = [conv for conv in found.convs if conv.is_constant]
    most = max((conv.varies for conv in found.convs), default=0.0)
    if found.convs and most < UNTRAINED:
        text = (
            "Every coefficient is the same for all images: the model computes a static network. So it is after a "
            "conversion that wasn't fine-tuned."
        )
        findings.append(Finding(level="note", text=text))
    elif constant and len(constant) == len(found.convs):
        text = (
            f"Coefficients hardly differ from image to image, by {most:.1e} at most: the model is static in effect. "
            "Its predictors have learnt little: train longer, at a higher learning rate for them, "
            "or from experts that differ more."
        )
        findings.append(Finding(level="warning", text=text))
    elif constant:
        text = (
            f"The coefficients of {_listed(constant)} hardly differ from image to image (by less than {CONSTANT:g}): "
            "static in effect. Look whether the predictor was frozen, is saturated, learnt too slowly, or so fast that "
            "no hidden unit is left alive."
        )
        findings.append(Finding(level="warning", text=text))
    for conv in found.convs:
        if conv.unused:
            which = ", ".join(str(i + 1) for i in conv.unused)
            text = (
                f"{conv.name}: expert{'s' if len(conv.unused) > 1 else ''} {which} of {conv.g} "
                f"{'are' if len(conv.unused) > 1 else 'is'} never used: no coefficient reaches {UNUSED:g}. "
                "A higher temperature, or a smaller g, would not waste the weights."
            )
            findings.append(Finding(level="warning", text=text))
    saturated = [conv for conv in found.convs if conv.is_saturated]
    if saturated:
        text = (
            f"The predictor of {_listed(saturated)} is saturated: {MOSTLY:.0%} or more of "
            "the coefficients are within 0.01 of 0 or 1, where it learns next to nothing. Train it at a higher "
            "temperature or a lower learning rate."
        )
        findings.append(Finding(level="warning", text=text))
    if found.unreached:
        text = f"No image reached {some(found.unreached)}: nothing is known of their coefficients."
        findings.append(Finding(level="note", text=text))
    by_class = [conv for conv in found.convs if conv.between_classes is not None and not conv.is_constant]
    if by_class:
        best = max(by_class, key=lambda conv: conv.between_classes)
        least = min(by_class, key=lambda conv: conv.between_classes)
        text = (
            f"Coefficients follow the class most in {best.name}, where {best.between_classes:.0%} of their variance "
            f"is between the classes, and least in {least.name}, with {least.between_classes:.0%}; the rest varies "
            f"between images of a class. By chance it would be {best.by_chance:.1%}."
        )
        findings.append(Finding(level="note", text=text))
    return findings


def of_correlations(found: list[LayerCorrelation]) -> list[Finding]:
    """Maps that carry the same, or nothing; whether the dynamic network's maps repeat one another less."""
    findings = []
    for layer in found:
        same = [pair for pair in layer.model.strongest if abs(pair.r) >= SAME]
        if same:
            named = some([f"{pair.first} and {pair.second} (r = {pair.r:.3f})" for pair in same], 3)
            text = f"{layer.layer}: feature maps {named} carry the same; one of each pair could go."
            findings.append(Finding(level="warning", text=text))
        if layer.model.constant:
            maps = some([str(i) for i in layer.model.constant])
            text = f"{layer.layer}: feature maps {maps} never vary. They carry nothing."
            findings.append(Finding(level="warning", text=text))
        if layer.against is not None:
            ours, theirs = layer.model.mean_absolute, layer.against.mean_absolute
            if f"{ours:.3f}" == f"{theirs:.3f}":
                text = f"{layer.layer}: feature maps correlate as in the original, |r| = {ours:.3f} in the mean."
            else:
                word = "less" if ours < theirs else "more"
                text = (
                    f"{layer.layer}: the mean correlation of two feature maps, |r|, is {ours:.3f}, against "
                    f"{theirs:.3f} in the original: they repeat one another {word}."
                )
            findings.append(Finding(level="note", text=text))
    return findings


def _listed(convs: list[ConvCoefficients]) -> str:
    return some([conv.name for conv in convs], 3)
