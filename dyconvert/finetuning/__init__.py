"""Fine-tuning by a recipe. Lightning is imported only when a run starts."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dyconvert.finetuning.recipes.recipe import Recipe, load_recipe
    from dyconvert.finetuning.summary import Summary

__all__ = ["Recipe", "finetune", "load_recipe"]


def finetune(
    recipe: "Recipe | str | os.PathLike[str]",
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    progress: bool = True,
    trust_code: bool = False,
    push_to: str | None = None,
) -> "Summary":
    """Convert a model and fine-tune it, as a recipe says.

    Args:
        recipe: name of a shipped recipe, a YAML file, or a recipe from :func:`load_recipe`.
        overrides: such as `train.lr=0.01`, where `recipe` is a name or a file.
        resume: continue the interrupted run in the recipe's output directory.
        progress: print progress and tables on stderr.
        trust_code: run code of the recipe's own: a model's factory in a Python file or module, arguments that may
            name files, a dataset's script. Models of torchvision, timm and this package just run.
        push_to: put the best model onto the Hugging Face Hub at the end, as `"user/name"`; see
            :func:`~dyconvert.push`. No recipe can ask for it: what is published is for you to say.

    Returns:
        The metrics of the original, the converted and the fine-tuned model, and where the result is:
        `dyconvert.load` reads that directory.

    Raises:
        RecipeError: the recipe has errors, names code that isn't trusted, or its data, devices, or run to resume
            aren't there or don't fit.
        ModelError, PlanError: the model can't be built or converted.
        TrainingError: training diverged.
        CheckpointError: `push_to` is no name of a repository; or the Hub can't be written to: then the run is finished
            all the same.
    """
    from dyconvert.finetuning.recipes.recipe import Recipe, load_recipe

    try:
        from dyconvert.finetuning import run
    except ImportError as error:
        from dyconvert.errors import RecipeError
        from dyconvert.installation import install_command

        raise RecipeError(f"Fine-tuning needs more packages: {error}. Run `{install_command('train')}`.") from error
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    return run.finetune(recipe, resume=resume, progress=progress, trust_code=trust_code, push_to=push_to)


def __getattr__(name: str) -> Any:
    # Recipes are checked by classes that take a tenth of a second to make.
    if name in ("Recipe", "load_recipe"):
        from dyconvert.finetuning.recipes import recipe

        return getattr(recipe, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
