"""The keys of a recipe: one class for each section, with each key's meaning and unit.

`dyconvert recipes schema` prints this as JSON Schema; `dyconvert.finetuning.recipes.recipe` reads recipes with it.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dyconvert.errors import PlanError
from dyconvert.limits import (
    CLASSES,
    COUNT,
    EXPERTS,
    FAKE_IMAGES,
    INPUT_SIDE,
    NORMAL,
    PROCESSES,
    RATE,
    SEED,
    TEMPERATURES,
)
from dyconvert.methods import METHODS, Method, get_method

Positive = Annotated[int, Field(ge=1, le=COUNT)]
Count = Annotated[int, Field(ge=0, le=COUNT)]
Classes = Annotated[int, Field(ge=1, le=CLASSES)]
Side = Annotated[int, Field(ge=1, le=INPUT_SIDE)]
Processes = Annotated[int, Field(ge=1, le=PROCESSES)]
Seed = Annotated[int, Field(ge=-SEED, le=SEED)]
Share = Annotated[float, Field(gt=0, le=1)]
Amount = Annotated[float, Field(ge=0, le=RATE)]
Rate = Annotated[float, Field(gt=0, le=RATE)]
Normal = Annotated[float, Field(ge=-NORMAL, le=NORMAL)]
Divisor = Annotated[float, Field(ge=TEMPERATURES[0], le=TEMPERATURES[1])]


# Augmentations that can be numbered, and applied to whole batches.
VIEWS = ("none", "flip", "shift", "cifar")


class Section(BaseModel):
    """Keys of a recipe. Unknown keys are refused."""

    # Docstrings under the keys are their descriptions in the JSON Schema.
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True)

    @field_validator("*")
    @classmethod
    def _no_end_of_text(cls, value: Any) -> Any:
        if isinstance(value, str) and "\0" in value:  # no file's name can have it
            raise ValueError("text can't have the character of the number 0")
        return value


class Model(Section):
    """The pretrained network."""

    specifier: str
    """resnet50, torchvision:NAME, timm:NAME, builtin:NAME, package.module:factory or file.py:factory.
    A Python file is looked for beside the recipe first, then in the current folder."""

    weights: str = "default"
    """"default", "none" (random), the name of a weight set, or a file (.pth .pt .th .safetensors), in which ~ and
    $VARIABLES are expanded."""

    arguments: dict[str, Any] = {}
    """Passed to the model's builder."""

    num_classes: Classes | None = None
    """Number of classes to learn. Where the pretrained model has another number, it gets a new head; null keeps it."""

    new_head: bool = False
    """A new head in any case, for a new task with as many classes."""

    input_size: tuple[Side, Side, Side] | None = None
    """(C, H, W) of one image; null takes data.channels and data.size."""


class Pretrain(Section):
    """Trains the static model first, on the same data, where there are no weights to start from."""

    epochs: Positive = 10
    lr: Rate = 0.1
    """Peak learning rate of that training; everything else is as in `train`, without distillation."""


class Convert(Section):
    """Static convs to dynamic ones. `convert: null` trains the static network: the control."""

    method: str = "dynet"
    """A method's name: `dyconvert methods` lists them."""

    g: Annotated[int, Field(ge=1, le=EXPERTS)] | None = None
    """Experts (weight sets) per conv; null takes the method's own."""

    scope: Literal["layer", "block"] | None = None
    """Whether a predictor serves one conv, or all convs of a block; null takes the method's own."""

    reduction: Count | None = None
    """Hidden units of a predictor: C_in / reduction; 0 for a single linear; null takes the method's own."""

    include: list[str] = []
    """Patterns of conv names, such as layer4.*; empty for all."""

    exclude: list[str] = []
    """Patterns of conv names that stay static."""

    include_stem: bool = False
    strict: bool = False
    """Refuse a model with a block whose convs can't share a predictor."""

    @field_validator("method")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in METHODS:
            get_method_or_value_error(name)
        return name

    def resolved(self, temperature: float | None = None) -> Method:
        """Return the method with this section's changes.

        Raises:
            PlanError: they make no sense together, such as one expert with a softmax.
        """
        changes = {"g": self.g, "scope": self.scope, "reduction": self.reduction, "temperature": temperature}
        return get_method(self.method, **changes)

    @model_validator(mode="after")
    def _makes_sense(self) -> "Convert":
        get_method_or_value_error(self.method, g=self.g, scope=self.scope, reduction=self.reduction)
        return self


def get_method_or_value_error(name: str, **changes: object) -> Method:
    """Return the method, as `get_method` does. Raises the kind of error that pydantic collects."""
    try:
        return get_method(name, **changes)
    except PlanError as error:
        raise ValueError(str(error)) from None


class Narrow(Section):
    """Fewer channels, by reconstruction; give `width` or `flops`."""

    width: Share | None = None
    """Share of the channels to keep."""

    flops: Share | None = None
    """Share of the original's multiply-adds to keep."""

    init: Literal["least-squares", "merge", "l1"] = "least-squares"
    """Weights that reconstruct the original's maps; averages of filters (no data); or plain pruning, the control."""

    calibration_images: Positive = 1000
    """Training images, without augmentation, that least-squares looks at."""

    keep: list[str] = []
    """Patterns of conv names that keep their width."""

    round_to: Positive = 8
    """Channel counts are rounded to a multiple of this."""

    @model_validator(mode="after")
    def _one_target(self) -> "Narrow":
        if (self.width is None) == (self.flops is None):
            raise ValueError("give one of width (share of the channels) and flops (share of the multiply-adds)")
        return self


class Data(Section):
    """Images and their labels."""

    dataset: str = "imagefolder"
    """imagefolder (root/train/CLASS/*.png, root/val/CLASS/*.png), torchvision:NAME, huggingface:NAME,
    digits (scikit-learn's, offline), or fake (random images, to try a recipe)."""

    root: str | None = None
    """Folder of the data, relative to the current one; ~ and $VARIABLES are expanded."""

    download: bool = False
    """Let torchvision download the files that are missing from `root`."""

    train: str = "train"
    """Name of the folder or split to train on."""

    val: str = "val"
    """Name of the folder or split to validate on."""

    arguments: dict[str, Any] = {}
    """Passed to the dataset's class, or to Hugging Face's load_dataset."""

    image_column: str = "image"
    label_column: str = "label"
    """Columns of a Hugging Face dataset."""

    task: Literal["classification", "segmentation"] = "classification"
    ignore_index: int = 255
    """Label of pixels that don't count; segmentation only."""

    num_classes: Classes | None = None
    """Needed only where the dataset can't say it itself: segmentation masks and fake data."""

    size: Side = 224
    """Side of the images that the network sees, in pixels."""

    resize: Side | None = None
    """Validation images: shorter side before the centre crop; null doesn't resize images of `size` already
    and otherwise takes size / 0.875."""

    channels: Literal[1, 3] = 3
    mean: tuple[Normal, ...] = (0.485, 0.456, 0.406)
    std: tuple[Normal, ...] = (0.229, 0.224, 0.225)
    """Mean and standard deviation of the normalisation, for images of 0 to 1, one number a channel."""

    augment: Literal[
        "none", "flip", "shift", "cifar", "imagenet", "imagenet-randaugment", "imagenet-trivialaugment", "segmentation"
    ] = "imagenet"
    """none; flip; shift (one pixel, no flip: digits); cifar (4-pixel pad and crop, flip); imagenet (random resized
    crop, flip), alone or with RandAugment or TrivialAugment; segmentation (random scale, crop, flip)."""

    views: Positive | None = None
    """See each training image in so many crops and flips, the same in every run; null for new ones every epoch. For the
    augmentations none, flip, shift and cifar, of images that are of `size` already."""

    holdout: Positive | None = None
    """Validate on so many of the training images, as many of each class, and train on the others: for choices that the
    validation images shall not have a part in. Chosen by `subset_seed`."""

    limit_train: Positive | None = None
    """Use this many training images, the same number of each class, chosen by `subset_seed`; null for all."""

    limit_val: Positive | None = None
    subset_seed: Seed = 0

    skip_corrupt: bool = False
    """Leave out images that can't be read, and count them, instead of stopping."""

    workers: Annotated[int, Field(ge=0, le=PROCESSES)] = 4
    """Processes that load images, of each training process."""

    images: Annotated[int, Field(ge=1, le=FAKE_IMAGES)] = 1000
    """Number of fake images."""

    @model_validator(mode="after")
    def _channels_agree(self) -> "Data":
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != self.channels:
                raise ValueError(f"{name} has {len(values)} numbers for {self.channels} channels; give one a channel")
        if min(self.std) <= 0:
            raise ValueError("std has to be above 0")
        return self

    @field_validator("dataset")
    @classmethod
    def _known_dataset(cls, dataset: str) -> str:
        head, colon, name = dataset.partition(":")
        if head in ("imagefolder", "digits", "fake") and not colon:
            return dataset
        if head in ("torchvision", "huggingface") and name:
            return dataset
        raise ValueError(
            "input should be 'imagefolder', 'digits', 'fake', 'torchvision:NAME' (such as torchvision:CIFAR10) "
            f"or 'huggingface:NAME', not {dataset!r}"
        )


class Train(Section):
    """Optimisation, and the devices that it runs on."""

    epochs: Positive = 10
    max_steps: Positive | None = None
    """Stop after this many optimizer steps, whatever `epochs` says; the schedules end there too."""

    batch: Positive = 128
    """Images per optimizer step, over all processes and accumulated batches together; so the learning rate stays
    right on any number of devices. Divisible by devices * nodes * accumulate."""

    accumulate: Positive = 1
    """Parts into which each process splits its share of a batch, to save memory."""

    eval_batch: Positive | None = None
    """Images per validation batch and process; null takes a process's share of `batch`."""

    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: Rate = 0.05
    """Peak learning rate, for the whole `batch`."""

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """SGD's."""

    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's."""

    schedule: Literal["cosine", "poly", "constant"] = "cosine"
    """To zero over the run: half a cosine; (1 - t)^0.9; or not at all."""

    warmup_epochs: Amount = 0.0
    """Linear rise to `lr`, in epochs (0.5 is half of one)."""

    weight_decay: Amount = 5e-5
    decay_exclude: list[Literal["norm", "bias", "predictor"]] = ["norm", "bias", "predictor"]
    """Parameters without weight decay."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    mixup: Amount = 0.0
    cutmix: Amount = 0.0
    """Alpha of the Beta distribution; 0 is off; with both, each batch gets one of them."""

    aux_weight: Amount = 0.5
    """Weight of the loss of auxiliary heads, where the network has them in training (FCN, GoogLeNet, Inception)."""

    clip: Rate | None = None
    """Largest norm of the gradient."""

    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of the moving average of the weights, per step; null is off."""

    channels_last: bool = False
    compile: bool = False
    seed: Seed = 0

    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    devices: Processes | Literal["auto"] = "auto"
    """Processes per machine, one a device; "auto" takes every GPU, or one process on the CPU."""

    nodes: Processes = 1
    """Machines."""

    strategy: Literal["auto", "ddp", "fsdp"] = "auto"

    @model_validator(mode="after")
    def _batch_divides(self) -> "Train":
        processes = self.nodes * (self.devices if isinstance(self.devices, int) else 1)
        if self.batch % (processes * self.accumulate):
            raise ValueError(
                f"batch = {self.batch} can't be split evenly among {processes} processes and {self.accumulate} "
                f"accumulated parts; make it a multiple of {processes * self.accumulate}"
            )
        return self


class Temperature(Section):
    """The predictors' temperature, linearly from `start` to `end`, then constant (Chen et al. 2020, section 3.3)."""

    start: Divisor = 30.0
    end: Divisor = 1.0
    epochs: Rate = 10.0
    """Epochs until `end` is reached."""


class Dynamic(Section):
    """Settings of dynamic convs; they have no effect if `convert` is null."""

    predictor_lr: Amount = 1.0
    """Factor on the learning rate of the predictors."""

    expert_lr: Amount | None = None
    """Factor on the learning rate of the experts. null: 1 / (g c^2) with SGD, 1 / (g c) with AdamW, where c is the
    coefficient that all start at (0.5, or 1/g): while the coefficients stay there, the mixed kernel then learns exactly
    as the static conv's does."""

    predictor_adam: Rate | None = None
    """Train the predictors with Adam, at this learning rate at the schedule's peak, whatever train.optimizer is. Their
    gradients are a hundred times smaller than the experts': with plain SGD short runs leave the coefficients equal.
    Hidden layers take a tenth of it."""

    temperature: Temperature | None = None
    """null keeps the method's own temperature."""

    freeze_experts_epochs: Amount = 0.0
    """Epochs at the start in which, of the converted convs, only the predictors train."""

    freeze_predictors_epochs: Amount = 0.0
    """Epochs at the start in which the predictors don't train. With equal coefficients the network trains as its static
    original for so long, and turns dynamic then: a late conversion."""

    expert_decay: Amount = 1.0
    """Factor on the weight decay of the experts."""

    diversity: Amount = 0.1
    """How far the experts differ at first, relative to each output channel's root mean square."""

    pair_spread: Rate | None = None
    """Start with experts that are equal in pairs and coefficients that already vary from image to image, by this
    standard deviation of the logits (1 gives sigmoids of 0.5 +- 0.2); the outputs are the original's all the same.
    See `dyconvert.pair_experts`. null starts with equal coefficients and different experts."""


class Distill(Section):
    """Knowledge distillation: (1 - weight) * cross entropy + weight * T^2 * KL(teacher || student)."""

    teacher: str = "original"
    """original: the network before conversion (and narrowing); or any specifier, as model.specifier takes it. At equal
    width the original holds the student down to itself."""

    teacher_weights: str = "default"
    """The weights of another teacher, as model.weights takes them."""

    teacher_mean: tuple[Normal, ...] | None = None
    teacher_std: tuple[Normal, ...] | None = None
    """Normalisation of the teacher's images; null takes data.mean and data.std."""

    temperature: Divisor = 4.0
    weight: Annotated[float, Field(gt=0, le=1)] = 0.5

    features: Amount = 0.0
    """Weight of feature distillation at the last stage: the squared error of what the heads read, over the variance of
    the teacher's; through a linear layer, trained along, where the widths differ. 0 is off."""

    cache: bool = False
    """Run the teacher once on each of the data.views, and keep its outputs in float16 for all runs."""

    cache_directory: str | None = None
    """Where; null is the folder teachers/ in data.root (in the current folder, where the data has no root). ~ and
    $VARIABLES are expanded."""


class Output(Section):
    """What is saved, and how often."""

    directory: str = "runs/{name}"
    """{name} is the recipe's name. Relative to the current folder; ~ and $VARIABLES are expanded."""

    checkpoint_steps: Positive | None = None
    """Save a checkpoint to resume from after every this many optimizer steps, and at the end of each epoch."""

    checkpoint_minutes: Rate | None = 5.0
    """Save one after every this many minutes, too; null is off."""

    loggers: list[Literal["csv", "tensorboard", "wandb", "mlflow"]] = ["csv"]
    """Lightning's; csv writes metrics.csv, and is always there."""
