"""The coefficients over real images, as data: how far they vary, between which classes, and which experts are used."""

from pydantic import BaseModel

BINS = 200
# The sums by class of one conv have at most this many numbers; if there were more, output channels are sampled.
CLASS_SUMS = 2**18
# A conv's signature shows at most this many classes, and output channels of each expert. If there are more, they are
# taken at even intervals.
SIGNATURE = 40, 64
# Images listed for each expert.
TOP = 6
# An expert whose coefficient never gets this large is not used: it adds nothing visible.
UNUSED = 0.01
# A sigmoid or softmax this close to 0 or 1 passes on hardly any gradient.
SATURATED = 0.01
# A predictor is called saturated if at least this share of its coefficients is.
MOSTLY = 0.9
# Standard deviation over the images below which a coefficient is a constant.
CONSTANT = 1e-3


class TopImage(BaseModel):
    """An image that drives an expert.

    Attributes:
        image: its number in the data.
        share: the expert's share of the mixture, eta_i / sum(eta), the mean over the output channels; for a single
            expert, its coefficient. An image that raises all experts alike drives none of them.
    """

    image: int
    share: float


class ExpertUse(BaseModel):
    """One expert over all images.

    Attributes:
        mean, smallest, largest: of its coefficients, over images and output channels.
        histogram: numbers of coefficients in each of `BINS` equal intervals from 0 to 1.
        class_means: mean coefficient over the images of each class; None for a class without images.
        top: the images that drive it most.
    """

    mean: float
    smallest: float
    largest: float
    histogram: list[int]
    class_means: list[float | None]
    top: list[TopImage]

    @property
    def used(self) -> bool:
        return self.largest >= UNUSED


class AxisUse(BaseModel):
    """The factors of one conv along one axis over all images: from 0 to 2, and 1 at the start of a conversion.

    Attributes:
        count: number of factors of each image.
        mean, smallest, largest: over images and factors.
        means: the mean of each factor over the images; at even intervals, if there are more than `SIGNATURE` has.
        spread, between_classes, saturated, constant: see :class:`ConvCoefficients`. A factor within 0.02 of 0 or 2 is
            saturated.
    """

    count: int
    mean: float
    smallest: float
    largest: float
    means: list[float]
    spread: float
    between_classes: float | None
    saturated: float
    constant: float


class ConvCoefficients(BaseModel):
    """The coefficients of one conv over all images.

    Attributes:
        block: the block whose predictor gives them; None: the conv's own predictor does.
        per: "layer" or "channel"; each expert has `channels` coefficients.
        temperature: the predictor's logits are divided by it.
        images: number of calls, times the batch.
        spread: standard deviation over the images, as the root mean square over the coefficients.
        between_classes: the share of the variance that lies between the classes' means (eta squared), over
            `channels_sampled` output channels; the rest lies within the classes. None without classes.
        by_chance: the average of that share if the classes didn't matter: (K - 1) / (N - 1).
        saturated: share of coefficients within 0.01 of 0 or 1.
        constant: share of coefficients that don't vary from image to image.
        effective: number of experts that share the mixture, from 1 to g: exp of the entropy of eta_i / sum(eta), the
            mean over images and channels.
        axes: the axes that the conv has factors for, among outputs, inputs and positions.
        signature: by class, the distance of each coefficient's mean from its mean over all images, in standard
            deviations over the images: `[g * channels]`, expert by expert. At most `SIGNATURE` classes and channels.
    """

    name: str
    block: str | None
    g: int
    per: str
    channels: int
    activation: str
    temperature: float
    images: int
    spread: float
    between_classes: float | None
    by_chance: float | None
    channels_sampled: int
    saturated: float
    constant: float
    effective: float
    experts: list[ExpertUse]
    signature: dict[int, list[float]]
    axes: dict[str, AxisUse] = {}

    @property
    def is_saturated(self) -> bool:
        return any(share >= MOSTLY for share in (self.saturated, *(axis.saturated for axis in self.axes.values())))

    @property
    def is_constant(self) -> bool:
        return all(share == 1.0 for share in (self.constant, *(axis.constant for axis in self.axes.values())))

    @property
    def varies(self) -> float:
        """The spread along the axis where it is the largest."""
        return max((self.spread, *(axis.spread for axis in self.axes.values())))

    @property
    def unused(self) -> list[int]:
        """The experts that no image uses."""
        return [i for i, expert in enumerate(self.experts) if not expert.used]


class Coefficients(BaseModel):
    """The coefficients of all dynamic convs over the images.

    Attributes:
        convs: in the model's order.
        unreached: dynamic convs that no image reached.
        classes: names of the classes; empty if the images have none.
        sampled: sentences that name the figures that come from a sample.
    """

    convs: list[ConvCoefficients]
    unreached: list[str]
    classes: list[str]
    sampled: list[str]
