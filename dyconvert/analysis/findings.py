"""An analysis in sentences: what stands out, good or bad, and what to do about it."""

from typing import Literal

from pydantic import BaseModel

from dyconvert.analysis.ablation import Ablation, Setting
from dyconvert.analysis.accuracy import Accuracy
from dyconvert.analysis.coefficients import CONSTANT, MOSTLY, UNUSED, Coefficients, ConvCoefficients
from dyconvert.analysis.correlation import SAME, LayerCorrelation
from dyconvert.errors import some

# How far the share of variance between classes must be above chance, and two mean correlations apart, to be worth a
# sentence: smaller ones change from one sample of images to the next.
MATTERS_CLASSES = 0.05
MATTERS_CORRELATION = 0.01
# Below it a coefficient's standard deviation is a matter of rounding.
UNTRAINED = 1e-6


class Finding(BaseModel):
    """One sentence or two; a "warning" is something to look into, a "note" something to know."""

    level: Literal["warning", "note"]
    text: str


def of_movement(coefficients: Coefficients) -> list[Finding]:
    """Whether coefficients differ from image to image at all; no finding where they do."""
    findings = []
    constant = [conv for conv in coefficients.convs if conv.is_constant]
    most = max((conv.varies for conv in coefficients.convs), default=0.0)
    if coefficients.convs and most < UNTRAINED:
        text = (
            "Every coefficient is the same for all images: the model computes a static network. So it is after a "
            "conversion that wasn't fine-tuned."
        )
        findings.append(Finding(level="note", text=text))
    elif constant and len(constant) == len(coefficients.convs):
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
    return findings


def of_coefficients(coefficients: Coefficients) -> list[Finding]:
    """Experts that are never used, predictors that are saturated, coefficients that follow the classes."""
    findings = []
    for conv in coefficients.convs:
        if conv.unused:
            which = ", ".join(str(i + 1) for i in conv.unused)
            text = (
                f"{conv.name}: expert{'s' if len(conv.unused) > 1 else ''} {which} of {conv.g} "
                f"{'are' if len(conv.unused) > 1 else 'is'} never used: no coefficient reaches {UNUSED:g}. "
                "A higher temperature, or a smaller g, would not waste the weights."
            )
            findings.append(Finding(level="warning", text=text))
    saturated = [conv for conv in coefficients.convs if conv.is_saturated]
    if saturated:
        text = (
            f"The predictor of {_listed(saturated)} is saturated: {MOSTLY:.0%} or more of "
            "the coefficients are within 0.01 of 0 or 1, where it learns next to nothing. Train it at a higher "
            "temperature or a lower learning rate."
        )
        findings.append(Finding(level="warning", text=text))
    if coefficients.unreached:
        text = f"No image reached {some(coefficients.unreached)}: nothing is known of their coefficients."
        findings.append(Finding(level="note", text=text))
    by_class = [
        conv
        for conv in coefficients.convs
        if conv.between_classes is not None
        and not conv.is_constant
        and conv.between_classes - conv.by_chance > MATTERS_CLASSES
    ]
    if by_class:
        best = max(by_class, key=lambda conv: conv.between_classes)
        text = (
            f"Coefficients follow the class most in {best.name}, where {best.between_classes:.0%} of their variance "
            f"is between the classes (by chance it would be {best.by_chance:.1%}); the rest varies between images of a "
            f"class. In {len(by_class)} of {len(coefficients.convs)} convs it is clearly above chance."
        )
        findings.append(Finding(level="note", text=text))
    return findings


def of_accuracy(accuracy: Accuracy) -> list[Finding]:
    """Whether the model classifies better or worse than the original, if there are enough images to tell."""
    if accuracy.original is None or accuracy.chance is None:
        return []
    ours, theirs = accuracy.model, accuracy.original
    parted = (
        f"{accuracy.only_model:,} images are right in this model alone, "
        f"{accuracy.only_original:,} in the original alone"
    )
    if accuracy.only_model == accuracy.only_original == 0:
        text = f"Both models have the same {ours.right:,} of {ours.images:,} images right."
    elif not accuracy.differs:
        text = (
            f"{ours.images:,} images don't tell the model from the original: {parted}, and chance alone would part "
            f"them as far in {accuracy.chance:.0%} of cases."
        )
    else:
        word = "better" if ours.right > theirs.right else "worse"
        text = (
            f"The model is {word} than the original by {abs(ours.percent - theirs.percent):.2f} points: {parted}. "
            f"Chance alone would part them as far in {accuracy.chance:.1%} of cases."
        )
        if word == "worse":
            return [Finding(level="warning", text=text)]
    return [Finding(level="note", text=text)]


def of_control(ablation: Ablation) -> list[Finding]:
    """The best dynamic setting against the static control: the same recipe, width and epochs without dynamic convs."""
    pairs = [(each, control) for each in ablation.settings if (control := control_of(each, ablation)) is not None]
    if not pairs:
        return []
    best, control = max(pairs, key=lambda pair: pair[0].scores["finetuned"].mean - pair[1].scores["finetuned"].mean)
    ours, theirs = best.scores["finetuned"], control.scores["finetuned"]
    difference = ours.mean - theirs.mean
    error = (ours.deviation**2 / ours.runs + theirs.deviation**2 / theirs.runs) ** 0.5
    text = (
        f"{best.run} reaches {ours.mean:.2f} % over {ours.runs} seed{'s' if ours.runs > 1 else ''}, its static control "
        f"{control.run} {theirs.mean:.2f} % over {theirs.runs}: "
    )
    if min(ours.runs, theirs.runs) < 2:
        text += f"{difference:+.2f} points, of which nothing is certain. Run more seeds."
    elif abs(difference) > 2 * error:
        text += f"{difference:+.2f} points, more than twice the standard error of {error:.2f}."
    else:
        text += f"{difference:+.2f} points, within twice the standard error of {error:.2f}: no difference."
    return [Finding(level="note", text=text)]


def control_of(setting: Setting, ablation: Ablation) -> Setting | None:
    """The static setting of the same recipe, width and epochs; None for a static setting, or where there is none."""

    def like(other: Setting) -> bool:
        same = ("recipe", "width", "flops", "epochs")
        return other.static and all(getattr(other, name) == getattr(setting, name) for name in same)

    if setting.static or "finetuned" not in setting.scores:
        return None
    return next((other for other in ablation.settings if like(other) and "finetuned" in other.scores), None)


def of_correlations(correlations: list[LayerCorrelation]) -> list[Finding]:
    """Maps that carry the same, or nothing; whether the dynamic network's maps repeat one another less."""
    findings = []
    for layer in correlations:
        same = [pair for pair in layer.model.strongest if abs(pair.r) >= SAME]
        if same:
            named = some([f"{pair.first} and {pair.second} (r = {pair.r:.3f})" for pair in same], 3)
            text = f"{layer.layer}: feature maps {named} carry the same; one of each pair could go."
            findings.append(Finding(level="warning", text=text))
        if layer.model.constant:
            maps = some([str(i) for i in layer.model.constant])
            text = f"{layer.layer}: feature maps {maps} never vary. They carry nothing."
            findings.append(Finding(level="warning", text=text))
        if layer.original is not None:
            ours, theirs = layer.model.mean_absolute, layer.original.mean_absolute
            if abs(ours - theirs) < MATTERS_CORRELATION:
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
