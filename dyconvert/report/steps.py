"""What to do next, by what an analysis shows: sentences, each with the command that does it."""

from typing import NamedTuple

from dyconvert.analysis.findings import UNTRAINED
from dyconvert.analysis.study import Analysis


class Step(NamedTuple):
    """A sentence, and the command that does what it says; DIR stands for the saved model."""

    text: str
    command: str = ""


def next_steps(analysis: Analysis) -> list[Step]:
    """The next steps, the most useful first."""
    if not analysis.dynamic:
        return [Step("The model is static. Convert it, and look at both.", "dyconvert MODEL --g 6")]
    steps = []
    convs = analysis.coefficients.convs if analysis.coefficients is not None else []
    if analysis.coefficients is None:
        steps.append(Step("Look at the coefficients on images.", "dyconvert report DIR --data images/"))
    elif convs and all(conv.varies < UNTRAINED for conv in convs):
        steps.append(
            Step(
                "The conversion hasn't been trained. Take a recipe near to your task, put your data in, and fine-tune.",
                "dyconvert recipes ls",
            )
        )
    elif convs and all(conv.is_constant for conv in convs):
        steps.append(
            Step(
                "The model is static in effect. Collapse it and measure again: it should lose nothing. Or train "
                "longer, with a higher learning rate for the predictors.",
                "dyconvert collapse DIR --output static.safetensors --data images/",
            )
        )
    if analysis.accuracy is None:
        steps.append(
            Step(
                "Measure the accuracy: give images in a folder whose subfolders are the classes.",
                "dyconvert report DIR --data images/",
            )
        )
    if analysis.ablation is None:
        steps.append(
            Step(
                "Compare with static fine-tuning by the same recipe: only that says what the mixing is worth.",
                "dyconvert recipes sweep ablate-g",
            )
        )
    steps.append(Step("Export it to where it will run.", "dyconvert export DIR"))
    return steps
