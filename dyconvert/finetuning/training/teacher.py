"""The teacher of a distillation, and its outputs for a batch."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyconvert import models
from dyconvert.errors import ModelError, RecipeError, brief, said_as
from dyconvert.finetuning.recipes.recipe import Recipe
from dyconvert.finetuning.recipes.words import TEACHER
from dyconvert.finetuning.training.outputs import outputs_of, reading
from dyconvert.models.heads import find_head


class Taught(NamedTuple):
    """A teacher's outputs.

    Attributes:
        logits: `[N, classes, ...]`.
        features: the inputs of its head, `[N, F]`; None unless features are distilled.
    """

    logits: Tensor
    features: Tensor | None = None


class Teacher:
    """A network that teaches. It isn't trained, and isn't saved or copied with the network that learns.

    Args:
        module: the network.
        recipe: says how the teacher's images are normalised, and whether features are distilled.
    """

    def __init__(self, module: nn.Module, recipe: Recipe) -> None:
        self.module = module.eval().requires_grad_(False)
        data, distill = recipe.data, recipe.distill
        self._head = self.module.get_submodule(head_of(module)) if distill.features else None
        mean, std = distill.teacher_mean or data.mean, distill.teacher_std or data.std
        # Maps images normalised for the network that learns to the teacher's normalisation; None if both are the same.
        self._affine = None
        if (mean, std) != (data.mean, data.std):
            pairs = torch.tensor([[data.mean, data.std], [mean, std]], dtype=torch.float64)
            (our_mean, our_std), (their_mean, their_std) = pairs.view(2, 2, -1, 1, 1)
            self._affine = (our_std / their_std).float(), ((our_mean - their_mean) / their_std).float()

    def to(self, device: torch.device) -> "Teacher":
        """Move it, in place."""
        self.module.to(device)
        if self._affine is not None:
            self._affine = tuple(tensor.to(device) for tensor in self._affine)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Taught:
        """The outputs for images `[N, C, H, W]` that are normalised for the network that learns."""
        if self._affine is not None:
            factor, shift = self._affine
            images = images * factor + shift
        if self._head is None:
            return Taught(next(outputs_of(self.module(images))))
        with reading(self._head) as read:
            logits = next(outputs_of(self.module(images)))
        return Taught(logits, read[0])

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        return self


def head_of(model: nn.Module) -> str:
    """The name of the layer whose inputs are distilled, the model's head.

    Raises:
        RecipeError: the model's head isn't known.
    """
    name = find_head(model)
    if name is None:
        raise RecipeError(
            f"distill.features is about what the last layer reads, and that of {type(model).__name__} is no linear and "
            "no 1x1 conv with bias. Set distill.features=0."
        )
    return name


def score(teacher: Teacher, recipe: Recipe, batches: Iterable[tuple[Tensor, ...]]) -> float:
    """Top-1 of a teacher on batches of images of 0 to 255 or 0 to 1, and targets, in percent."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (recipe.data.mean, recipe.data.std))
    right = count = 0
    for images, targets in batches:
        images = images.float().div_(255) if images.dtype == torch.uint8 else images
        right += int((teacher((images - mean) / std).logits.argmax(1) == targets).sum())
        count += len(targets)
    return 100 * right / count


def create_teacher(recipe: Recipe, original: nn.Module, num_classes: int) -> Teacher | None:
    """The recipe's teacher; None if it doesn't distill.

    Raises:
        ModelError: it can't be built, or not with these weights.
        RecipeError: it has another number of classes.
    """
    distill = recipe.distill
    if distill is None:
        return None
    if distill.teacher == "original":
        return Teacher(original, recipe)
    try:
        with said_as(TEACHER):
            module, _ = models.create(distill.teacher, distill.teacher_weights)
    except ModelError as error:
        raise ModelError(f"The teacher (distill.teacher, distill.teacher_weights): {error}") from error
    teacher = Teacher(module, recipe)
    try:
        logits = teacher(torch.zeros(2, *recipe.input_size)).logits
    except Exception as error:
        size = "x".join(map(str, recipe.input_size))
        raise RecipeError(
            f"The teacher {distill.teacher} can't take images of {size}: {brief(error)}. Take another."
        ) from error
    if logits.shape[1] != num_classes:
        raise RecipeError(
            f"The teacher {distill.teacher} tells {logits.shape[1]} classes apart, and the network {num_classes}. Take "
            "one that was trained on this data."
        )
    return teacher


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of softened outputs (Hinton et al. 2015, arXiv:1503.02531), mean over images.

    Args:
        student, teacher: logits `[N, classes, ...]`; with dense logits, the mean is over pixels too.
    """
    student = F.log_softmax(student.float() / temperature, dim=1)
    teacher = F.log_softmax(teacher.float() / temperature, dim=1)
    positions = student.numel() / student.shape[1]
    return F.kl_div(student, teacher, reduction="sum", log_target=True) * (temperature**2 / positions)


class FeatureDistillation(nn.Module):
    """The squared error of the heads' inputs, over the variance of the teacher's (FitNets, arXiv:1412.6550, eq. 3).

    Args:
        head: name of the head of the network that learns.
        ours, theirs: features of the two networks.
        mapped: whether a linear layer, which is trained too, maps ours to the teacher's. Features can be compared
            without it only if both networks are versions of one.
    """

    def __init__(self, head: str, ours: int, theirs: int, mapped: bool) -> None:
        super().__init__()
        self.head = head
        self.map = nn.Linear(ours, theirs) if mapped or ours != theirs else nn.Identity()

    def head_in(self, model: nn.Module) -> nn.Module:
        """The head of the network that learns."""
        return model.get_submodule(self.head)

    def forward(self, features: Tensor, taught: Tensor) -> Tensor:
        """The error, from `[N, ours]` and `[N, theirs]`."""
        taught = taught.float()
        return F.mse_loss(self.map(features.float()), taught) / taught.var().clamp_min(1e-6)


def feature_distillation(
    recipe: Recipe, original: nn.Module, student: nn.Module, teacher: Teacher
) -> FeatureDistillation:
    """The recipe's feature distillation, with the same random weights for the same seed."""
    head = head_of(original)
    example = torch.zeros(2, *recipe.input_size)
    training = student.training
    with torch.no_grad(), reading(student.get_submodule(head)) as read:
        student.eval()(example)
    student.train(training)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.train.seed)
        mapped = recipe.distill.teacher != "original"
        return FeatureDistillation(head, read[0].shape[1], teacher(example).features.shape[1], mapped)
