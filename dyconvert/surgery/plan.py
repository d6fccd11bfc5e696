"""Plan: every conv of a model, converted or skipped with a reason. Readable, editable, JSON."""

import textwrap
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator
from rich.console import Console
from rich.table import Table

from dyconvert.errors import PlanError
from dyconvert.methods import Method
from dyconvert.names import matching

SCHEMA: Literal[2] = 2
# Plans of schema 1 named a node of an FX graph as what a predictor reads; surgery/old_plans.py finds its argument.
_OLD = 1


class PlannedConv(BaseModel):
    """What is to become of one conv.

    Attributes:
        name: where it stands, as in `model.get_submodule(name)`.
        kind: its class.
        in_channels, out_channels, kernel_size, groups: as in the conv.
        map_size: the spatial size of the map it reads, where a trial run has shown it.
        convert: whether it becomes dynamic.
        reason: why not, where it doesn't.
        block: the block whose predictor gives its coefficients; None: a predictor of its own.
        note: why it has a predictor of its own where the method shares one per block.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    name: str
    kind: str
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    groups: int
    map_size: tuple[int, ...] | None = None
    convert: bool = True
    reason: str | None = None
    block: str | None = None
    note: str | None = None

    def skip(self, reason: str) -> None:
        """Leave this conv static, for this reason."""
        self.convert, self.reason, self.block, self.note = False, reason, None, None

    @property
    def label(self) -> str:
        size = "x".join(map(str, self.kernel_size))
        depthwise = self.groups == self.in_channels > 1
        groups = " depthwise" if depthwise else f" groups={self.groups}" if self.groups > 1 else ""
        return f"{size} {self.in_channels}→{self.out_channels}{groups}"


class PlannedBlock(BaseModel):
    """A block whose convs share one predictor.

    Attributes:
        name: where it stands; "" is the model itself.
        reads: what the predictor reads: a parameter of the block's forward, or a part of one, as `x[0]`. Of a list
            or dict of maps it reads all.
        in_channels: the channels of what it reads.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    reads: str
    in_channels: Annotated[int, Field(ge=1)]


class Plan(BaseModel):
    """What a conversion does to every conv of a model.

    `print(plan)` shows it as a table; `plan[name]` is one conv's entry; `plan.skip("layer4.*")` and
    `plan.unshare("*.conv1")` edit it; `plan.to_json()` and `Plan.from_json(text)` carry it over.
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1, 2] = SCHEMA
    model: str
    method: Method
    convs: list[PlannedConv]
    blocks: list[PlannedBlock] = []
    warnings: list[str] = []

    # What the plan was made with, for convert() to check its result on; it isn't saved.
    _example: Any = PrivateAttr(default=None)

    @model_validator(mode="before")
    @classmethod
    def _without_what_schema_1_had(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("schema_version") == _OLD:
            blocks = data.get("blocks", [])
            if isinstance(blocks, list):
                plain = [{k: v for k, v in b.items() if k != "given"} if isinstance(b, dict) else b for b in blocks]
                data = data | {"blocks": plain}
        return data

    def __eq__(self, other: object) -> bool:
        # Private attributes, as the example, don't count.
        return isinstance(other, Plan) and self.model_dump() == other.model_dump()

    @property
    def example(self) -> Any:
        """The example that the plan was made with: the user's, or shapes on the meta device; None if it isn't known."""
        return self._example

    @property
    def is_old(self) -> bool:
        """Whether the blocks' `reads` name nodes of FX graphs, as they did in schema 1."""
        return self.schema_version == _OLD

    def __getitem__(self, name: str) -> PlannedConv:
        for conv in self.convs:
            if conv.name == name:
                return conv
        raise PlanError(f"The plan has no conv {name!r}. Its convs are listed by print(plan).")

    @property
    def converted(self) -> list[PlannedConv]:
        return [conv for conv in self.convs if conv.convert]

    @property
    def skipped(self) -> list[PlannedConv]:
        return [conv for conv in self.convs if not conv.convert]

    def reasons(self) -> dict[str, int]:
        """How many convs are skipped for each reason, most frequent first."""
        return dict(Counter(conv.reason or "no reason given" for conv in self.skipped).most_common())

    def notes(self) -> dict[str, int]:
        """How many convs have a predictor of their own, by why they share none; most frequent first."""
        return dict(Counter(conv.note for conv in self.converted if conv.note).most_common())

    def shared(self, block: str) -> list[PlannedConv]:
        """The convs that get their coefficients from `block`'s predictor, in order."""
        return [conv for conv in self.converted if conv.block == block]

    def skip(self, *patterns: str, reason: str = "skipped by hand") -> None:
        """Leave the convs whose names match static (shell patterns).

        Raises:
            PlanError: a pattern matches no conv.
        """
        for name in matching(patterns, [conv.name for conv in self.convs]):
            self[name].skip(reason)

    def unshare(self, *patterns: str) -> None:
        """Give the convs whose names match predictors of their own (shell patterns).

        Raises:
            PlanError: a pattern matches no conv.
        """
        for name in matching(patterns, [conv.name for conv in self.convs]):
            if self[name].block is not None:
                self[name].block, self[name].note = None, "unshared by hand"

    def to_json(self, indent: int | None = 2) -> str:
        return self.model_dump_json(indent=indent)

    @classmethod
    def from_json(cls, text: str | bytes) -> "Plan":
        """Read what :meth:`to_json` wrote.

        Raises:
            PlanError: not JSON, not a plan, or a plan of another schema version.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise PlanError(f"This isn't a plan that this version of dyconvert reads: {problems(error)}") from None

    def summary(self) -> str:
        """Counts, in a few lines: converted, shared, skipped by reason."""
        converted = len(self.converted)
        shared = sum(conv.block is not None for conv in self.converted)
        blocks = len({conv.block for conv in self.converted if conv.block is not None})
        lines = [f"{len(self.convs)} convs: {converted} converted, {len(self.convs) - converted} skipped"]
        if shared:
            lines.append(f"  {shared} share the predictors of {blocks} blocks, {converted - shared} have their own")
        else:
            lines.append(f"  {converted} have a predictor each")
        for title, counts in (("own predictor", self.notes()), ("skipped", self.reasons())):
            for why, count in counts.items():
                lines += textwrap.wrap(f"  {count} {title}: {why}", 80, subsequent_indent="      ")
        return "\n".join(lines)

    def table(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("conv", overflow="fold", ratio=3)
        table.add_column("shape", overflow="fold", ratio=2)
        table.add_column("reads")
        table.add_column("becomes", overflow="fold", ratio=3)
        for conv in self.convs:
            if not conv.convert:
                becomes = f"static ({conv.reason})"
            elif conv.block is not None:
                becomes = f"dynamic, predictor of {conv.block or 'the model'}"
            else:
                becomes = "dynamic, own predictor"
            size = "x".join(map(str, conv.map_size)) if conv.map_size else "?"
            table.add_row(conv.name or "(the model)", conv.label, size, becomes)
        return table

    def __str__(self) -> str:
        console = Console(no_color=True, highlight=False)
        with console.capture() as capture:
            console.print(self.table())
        method = f"{self.model}, method {self.method.name}, g = {self.method.g}"
        return f"{method}\n\n{capture.get()}\n{self.summary()}"

    __repr__ = __str__


def problems(error: ValidationError) -> str:
    """A validation error's findings in one line."""
    messages = [f"{'.'.join(map(str, e['loc'])) or 'document'}: {e['msg']}" for e in error.errors()]
    return "; ".join(messages[:5]) + (f"; and {len(messages) - 5} more" if len(messages) > 5 else "")
