"""The options of `dyconvert convert` for narrowing, and the lines that it prints about it."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rich.text import Text
from torch import Tensor, nn

from dyconvert.cli.opening import images_for
from dyconvert.console import out
from dyconvert.errors import PlanError
from dyconvert.marks import narrowing_of
from dyconvert.narrowing.narrow import narrow
from dyconvert.narrowing.record import Narrowing, NarrowingWarning


@dataclass
class Options:
    """The options as they were given."""

    width: float | None
    flops: float | None
    data: str | None
    init: Any
    static: bool
    keep: tuple[str, ...]
    round_to: int
    calibration_images: int
    mean: str | None
    std: str | None

    @property
    def wanted(self) -> bool:
        return self.width is not None or self.flops is not None

    @property
    def suffix(self) -> str:
        """The part of the saved directory's name that tells the width."""
        if not self.wanted:
            return ""
        return f"-width{self.width:g}" if self.width is not None else f"-flops{self.flops:g}"

    def check(self) -> None:
        """Refuse narrowing's options without narrowing.

        Raises:
            PlanError: one was given.
        """
        options = {"--data": self.data, "--init": self.init, "--static": self.static, "--keep": self.keep}
        if not self.wanted and (alone := [name for name, value in options.items() if value]):
            raise PlanError(f"{', '.join(alone)} is for narrowing. Say how far: --width 0.5, or --flops 0.3.")

    def refuse_dry_run(self) -> None:
        if self.wanted:
            raise PlanError("--dry-run shows the conversion alone. Leave out --width and --flops, or --dry-run.")

    def narrow(
        self,
        model: nn.Module,
        example: tuple[Any, ...],
        seed: int,
        progress: Callable[[str, int, int], None],
        chosen: dict[str, Any],
    ) -> nn.Module:
        """Narrow the model, and convert it unless it is to stay static."""
        with warnings.catch_warnings():
            # They stand in the record, which is printed.
            warnings.simplefilter("ignore", NarrowingWarning)
            return narrow(
                model,
                width=self.width,
                flops=self.flops,
                example=example,
                data=None if self.data is None else self._images(self.data, model, example),
                init=self.init,
                static=self.static,
                keep=self.keep,
                round_to=self.round_to,
                calibration_images=self.calibration_images,
                seed=seed,
                progress=progress,
                **chosen,
            )

    def _images(self, data: str, model: nn.Module, example: tuple[Any, ...]) -> Iterator[Tensor]:
        images = images_for(data, model, example, self.mean, self.std, self.calibration_images)
        return (batch for batch, _ in images.batches(32))

    def as_json(self, model: nn.Module) -> dict[str, Any]:
        narrowing = narrowing_of(model)
        return {} if narrowing is None else {"narrowing": narrowing.model_dump(mode="json")}


def print_narrowing(narrowing: Narrowing) -> None:
    before, after = (sum(getattr(group, when) for group in narrowing.groups) for when in ("before", "after"))
    out.print(f"narrowed, weights by {narrowing.init}: {after} of {before} channels in {len(narrowing.groups)} groups")
    for line in narrowing.summary_lines():
        out.print(Text(f"  {line}", style="yellow" if line.startswith("warning") else ""))
    for why in dict.fromkeys(group.kept for group in narrowing.groups if group.kept):
        names = [group.name for group in narrowing.groups if group.kept == why]
        out.print(
            Text(f"  kept, {why}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}")
        )
    if narrowing.layers:
        errors = [
            f"{layer.name} {'?' if layer.error is None else f'{layer.error:.3f}'}{' (merged)' if layer.why else ''}"
            for layer in narrowing.layers
        ]
        out.print(Text(f"  error of each layer on held-out images: {', '.join(errors)}"))
