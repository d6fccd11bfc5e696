"""The differences between the published dynamic convolutions, as data.

Every one of them keeps g weight sets ("experts") per conv and mixes them per image by predicted
coefficients. They differ in the choices of a :class:`Method`. One conv module and one predictor serve all of
them, and any other mixture that you write down yourself.
"""

import difflib
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dyconvert.errors import PlanError
from dyconvert.limits import COUNT, EXPERTS, TEMPERATURES

Axis = Literal["experts", "outputs", "inputs", "positions"]
AXES: tuple[Axis, ...] = get_args(Axis)


class Method(BaseModel):
    """One way to predict the coefficients that mix g weight sets.

    Attributes:
        name: what `--method` takes.
        g: number of experts (weight sets) per conv, unless asked otherwise.
        per: one coefficient per expert for the whole `layer`, or for each output `channel`.
        activation: `sigmoid` (each coefficient in 0..1), or `softmax` over the experts.
        temperature: divides the logits: softmax(z / T), sigmoid(z / T). Saved with the model.
        reduction: None for one linear; r for two with a ReLU between them and C_in / r hidden units.
        reduce_from: two linears only where the predictor reads at least this many channels.
        least_hidden: hidden units that there are at least.
        normalised: whether the hidden units are normalised before the ReLU, by a layer norm, which unlike a batch norm
            can train with one image.
        axes: along what the predictor says something: "experts", which mix by coefficients; and "outputs", "inputs" and
            "positions", the output channels, input channels and kernel positions, by factors of 0..2 that start at 1
            (2 sigmoid(z / T)). Without "experts" there is one.
        scope: one predictor per `layer`, or per `block`, reading the block's input.

    Examples:
        >>> from dyconvert import METHODS
        >>> METHODS["dynet"].g
        6
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = "custom"
    g: Annotated[int, Field(ge=1, le=EXPERTS)] = 6
    per: Literal["layer", "channel"] = "channel"
    activation: Literal["sigmoid", "softmax"] = "sigmoid"
    temperature: Annotated[float, Field(ge=TEMPERATURES[0], le=TEMPERATURES[1])] = 1.0
    reduction: Annotated[int, Field(ge=1, le=COUNT)] | None = 4
    reduce_from: Annotated[int, Field(ge=1, le=COUNT)] = 1
    least_hidden: Annotated[int, Field(ge=1, le=COUNT)] = 4
    normalised: bool = False
    axes: tuple[Axis, ...] = ("experts",)
    scope: Literal["layer", "block"] = "block"
    title: str = ""
    paper: str = ""

    @model_validator(mode="after")
    def _something_is_dynamic(self) -> "Method":
        if len(set(self.axes)) < len(self.axes) or not self.axes:
            raise ValueError(f"axes are some of {', '.join(AXES)}, each once")
        if self.g > 1 and "experts" not in self.axes:
            raise ValueError(f"{self.g} experts need the axis 'experts', which mixes them; take g = 1")
        if self.axes == ("experts",) and not self.mixes_experts:
            raise ValueError("softmax over one expert is always 1, nothing would be dynamic; take g >= 2")
        return self

    @property
    def mixes_experts(self) -> bool:
        """Whether the experts' coefficients are predicted: a softmax over one expert is always 1."""
        return "experts" in self.axes and (self.g > 1 or self.activation == "sigmoid")

    @property
    def initial_coefficient(self) -> float:
        """Every expert's coefficient while the predictor's logits are zero."""
        return 0.5 if self.activation == "sigmoid" and self.mixes_experts else 1.0 / self.g

    def hidden_features(self, in_features: int) -> int | None:
        """Hidden units of a predictor that reads `in_features` channels; None for a single linear."""
        if self.reduction is None or in_features < self.reduce_from:
            return None
        return max(in_features // self.reduction, self.least_hidden)


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="dynet",
            g=6,
            per="channel",
            activation="sigmoid",
            reduction=4,
            # The paper's two linears are its ResNets'; MobileNet's narrow inputs take one.
            reduce_from=64,
            scope="block",
            title="DyNet: one predictor per block, one coefficient per expert and output channel",
            paper="Zhang et al. 2020, arXiv:2004.10694",
        ),
        Method(
            name="condconv",
            g=8,
            per="layer",
            activation="sigmoid",
            reduction=None,
            scope="layer",
            title="CondConv: one predictor per conv, one coefficient per expert",
            paper="Yang et al. 2019, arXiv:1904.04971",
        ),
        Method(
            name="dyconv",
            g=4,
            per="layer",
            activation="softmax",
            # Where the paper's annealing starts: flat coefficients let every expert learn early on.
            temperature=30.0,
            reduction=4,
            scope="layer",
            title="Dynamic Convolution: one predictor per conv, softmax over the experts",
            paper="Chen et al. 2020, arXiv:1912.03458",
        ),
        Method(
            name="odconv",
            g=4,
            per="layer",
            activation="softmax",
            temperature=30.0,
            reduction=16,
            least_hidden=16,
            normalised=True,
            axes=("experts", "outputs", "inputs", "positions"),
            scope="layer",
            title="ODConv: one predictor per conv, for experts, output channels, input channels and kernel positions",
            paper="Li, Zhou, Yao 2022, arXiv:2209.07947",
        ),
    )
}


def get_method(method: "str | Method" = "dynet", **changes: object) -> Method:
    """The method called `method`, with the `changes` that are not None; `reduction=0` is a single linear.

    Raises:
        PlanError: no method has that name, or a change is out of range.
    """
    if isinstance(method, str):
        if method not in METHODS:
            near = difflib.get_close_matches(method, METHODS, n=1, cutoff=0.4)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise PlanError(f"There is no method {method!r}.{hint} The methods are {', '.join(METHODS)}.")
        method = METHODS[method]
    elif not isinstance(method, Method):
        raise PlanError(
            f"A method is one of {', '.join(METHODS)}, or a dyconvert.Method, and not a {type(method).__name__}."
        )
    changed = {key: value for key, value in changes.items() if value is not None}
    if type(changed.get("reduction")) is int and changed["reduction"] == 0:
        changed["reduction"] = None
    try:
        return Method.model_validate(method.model_dump() | changed)
    except ValidationError as error:
        problems = "; ".join(
            ": ".join([*map(str, e["loc"]), e["msg"].removeprefix("Value error, ")]) for e in error.errors()
        )
        raise PlanError(f"Method {method.name!r} can't be changed like that: {problems}.") from None
