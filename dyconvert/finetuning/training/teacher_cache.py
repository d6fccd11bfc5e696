"""Caches a teacher's outputs for the numbered views of all training images, beside the data, for all runs.

DIRECTORY/KEY/view-3.safetensors holds the outputs for view 3, in float16: logits `[images, classes]` and, with
`distill.features`, features `[images, F]`. KEY is a hash of everything that the outputs depend on: the teacher's
weights, the images, and how they are cropped and normalised. Runs that start at the same time share the work.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from dyconvert.errors import RecipeError, TrainingError, brief
from dyconvert.finetuning.data.datasets import Split
from dyconvert.finetuning.data.loading import Prepared, TeacherOutputs
from dyconvert.finetuning.recipes.recipe import Recipe
from dyconvert.finetuning.training.teacher import Teacher

# The version of the file format, and of the numbered views' definition.
_VERSION = "1"
_BATCH = 250


def cache_directory(recipe: Recipe) -> Path:
    """The directory of the outputs of a recipe's teachers."""
    configured = recipe.distill.cache_directory
    if configured is not None:
        return Path(os.path.abspath(os.path.expanduser(os.path.expandvars(configured))))
    return (recipe.data_root or Path.cwd()) / "teachers"


def cached_outputs(
    recipe: Recipe,
    teacher: Teacher,
    split: Split,
    device: torch.device,
    stopping: Callable[[], bool],
    report: Callable[[str], None],
) -> TeacherOutputs:
    """Read the outputs for all views; compute and write those that are missing.

    Args:
        split: the training images.
        device: the teacher runs there.
        stopping: whether the user wants to stop; the views written so far stay.
        report: gets a line for each view that is computed.

    Raises:
        RecipeError: the images can't be cropped as batches; the directory can't be written.
        TrainingError: the teacher's outputs aren't finite.
    """
    prepared = Prepared(split, recipe.train.seed, recipe.data, training=True)
    if prepared.views is None:
        raise RecipeError(
            f"distill.cache needs images that fit into memory, all of {recipe.data.size} x {recipe.data.size}, and "
            "these don't. Set distill.cache=false."
        )
    maker = _Maker(recipe, teacher.to(device), prepared, device, stopping)
    directory = cache_directory(recipe) / maker.key
    try:
        directory.mkdir(parents=True, exist_ok=True)
        files = [directory / f"view-{number}.safetensors" for number in range(recipe.data.views)]
        # First the views that no other run is computing; then wait for the others.
        for wait in (False, True):
            for number, file in enumerate(files):
                if _read(file, maker.key) is not None:
                    continue
                with _locked(file.with_suffix(".lock"), wait) as mine:
                    if not mine or _read(file, maker.key) is not None:
                        continue
                    report(f"the teacher's outputs for view {number + 1} of {len(files)}, to {directory}")
                    _write(file, maker.make(number), maker.key)
        views = [_read(file, maker.key) for file in files]
    except OSError as error:
        raise RecipeError(
            f"The teacher's outputs can't be kept in {directory}: {brief(error)}. Set distill.cache_directory."
        ) from error
    return TeacherOutputs(*(torch.stack([view[name] for view in views]) for name in views[0]))


class _Maker:
    """Computes the teacher's outputs for the views."""

    def __init__(
        self, recipe: Recipe, teacher: Teacher, prepared: Prepared, device: torch.device, stopping: Callable[[], bool]
    ) -> None:
        self.teacher, self.prepared, self.device, self.stopping = teacher, prepared, device, stopping
        self.images = prepared.split.stacked[0]
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (recipe.data.mean, recipe.data.std))
        self.key = self._key(recipe)

    def _key(self, recipe: Recipe) -> str:
        data, distill = recipe.data, recipe.distill
        digest = hashlib.sha256()
        settings = (_VERSION, data.augment, data.mean, data.std, distill.teacher_mean, distill.teacher_std)
        digest.update(repr((settings, bool(distill.features), type(self.teacher.module).__qualname__)).encode())
        for name, tensor in self.teacher.module.state_dict().items():
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(_bytes(tensor))
        digest.update(f"{tuple(self.images.shape)} {self.images.dtype}".encode())
        digest.update(_bytes(self.images))
        return digest.hexdigest()[:32]

    def make(self, number: int) -> dict[str, Tensor]:
        """The outputs for the view of this number."""
        batches: dict[str, list[Tensor]] = {}
        for start in range(0, len(self.images), _BATCH):
            if self.stopping():
                raise KeyboardInterrupt
            images = self.prepared.numbered(number, range(start, min(start + _BATCH, len(self.images))))
            images = images.float().div_(255) if images.dtype == torch.uint8 else images
            taught = self.teacher(((images - self.mean) / self.std).to(self.device))
            for name, tensor in taught._asdict().items():
                if tensor is not None:
                    batches.setdefault(name, []).append(tensor.to("cpu", torch.float16))
        outputs = {name: torch.cat(tensors) for name, tensors in batches.items()}
        if not all(torch.isfinite(tensor).all() for tensor in outputs.values()):
            raise TrainingError("The teacher's outputs aren't finite numbers of float16. Take another teacher.")
        return outputs


def _bytes(tensor: Tensor) -> memoryview:
    numbers: Any = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(numbers)


def _hash(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}".encode())
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def _read(file: Path, key: str) -> dict[str, Tensor] | None:
    """The outputs in a file; None if there is no file, or it was changed or damaged."""
    try:
        with safetensors.safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError):
        return None
    whole = metadata.get("key") == key and metadata.get("sha256") == _hash(tensors)
    return {name: tensors[name] for name in ("logits", "features") if name in tensors} if whole else None


def _write(file: Path, tensors: dict[str, Tensor], key: str) -> None:
    unfinished = file.with_suffix(f".{os.getpid()}.part")
    try:
        unfinished.write_bytes(safetensors.torch.save(tensors, {"key": key, "sha256": _hash(tensors)}))
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(file: Path, wait: bool) -> Iterator[bool]:
    """Yields whether this process has the lock, which ends with the process. True if the system has no such locks."""
    try:
        import fcntl
    except ImportError:
        yield True
        return
    with file.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
