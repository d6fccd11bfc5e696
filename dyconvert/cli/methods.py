"""dyconvert methods"""

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from dyconvert.cli.options import Json
from dyconvert.console import out, write_json

if TYPE_CHECKING:
    from dyconvert.methods import Method


def methods(as_json: Json = False) -> None:
    """List the methods, what each does, and its paper."""
    from dyconvert.methods import METHODS

    if as_json:
        write_json({name: method.model_dump(mode="json") for name, method in METHODS.items()})
        return
    for method in METHODS.values():
        out.print(Text(method.name, style="bold"), Text(f"g = {method.g}"))
        out.print(f"  {method.title}")
        # A grid, so that what doesn't fit goes on below its beginning.
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_row("  coefficients", _coefficients(method))
        table.add_row("  predictor", _predictor(method))
        table.add_row("  paper", method.paper)
        out.print(table)
        out.print()
    out.print("Any mixture works as well: see --scope, --reduction, --temperature, and dyconvert.Method.")


def _coefficients(method: "Method") -> str:
    per = "output channel" if method.per == "channel" else "conv"
    if method.activation == "sigmoid":
        text = f"g per {per}, sigmoid"
    else:
        text = f"g per {per}, softmax(z / T) from T = {method.temperature:g}"
    others = [axis for axis in method.axes if axis != "experts"]
    return text + (f"; factors 2 sigmoid(z / T) of {', '.join(others)}" if others else "")


def _predictor(method: "Method") -> str:
    if method.reduction is None:
        return f"one per {method.scope}: pool, linear"
    wide = f" (one linear below {method.reduce_from} channels)" if method.reduce_from > 1 else ""
    least = f", at least {method.least_hidden}" if method.least_hidden > 4 else ""
    norm = " layer norm," if method.normalised else ""
    return f"one per {method.scope}: pool, linear to C_in/{method.reduction}{least},{norm} ReLU, linear{wide}"
