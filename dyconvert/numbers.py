"""Numbers that the user passes, checked: each is of the right kind and within its range, or refused by name."""

import math
import numbers
from typing import Any

from dyconvert.errors import PlanError
from dyconvert.limits import SEED


def whole(name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """A whole number, of numpy's too; True and False are none.

    Raises:
        PlanError: it isn't one, or is out of range.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise PlanError(f"{name}={_shown(value)} is no whole number. Give one, such as {max(least or 0, 0)}.")
    number = int(value)
    if (least is not None and number < least) or (most is not None and number > most):
        upper = "" if most is None else f" and at most {most:,}"
        raise PlanError(f"{name}={_shown(value)} is out of range. It is at least {least or 0:,}{upper}.")
    return number


def real(name: str, value: Any, least: float, most: float) -> float:
    """A finite number within a range; True and False are none.

    Raises:
        PlanError: it isn't one, or is out of range.
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise PlanError(f"{name}={_shown(value)} is no number. Give one, such as {max(least, min(most, 0.5)):g}.")
    number = float(value)
    if not least <= number <= most:  # nor is NaN
        raise PlanError(f"{name}={_shown(value)} is out of range. It is at least {least:g} and at most {most:g}.")
    return number


def share(name: str, value: Any) -> float:
    """A part of a whole: above 0, and 1 at most.

    Raises:
        PlanError: it isn't one.
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not 0 < float(value) <= 1:
        raise PlanError(f"{name}={_shown(value)} is out of range. It is a share of the original's: 0 < {name} <= 1.")
    return float(value)


def seed_of(value: Any) -> int:
    """A seed of torch's generators.

    Raises:
        PlanError: it isn't one.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or abs(int(value)) > SEED:
        raise PlanError(f"seed={_shown(value)} is no seed. Give a whole number, at most {SEED} in size, such as 0.")
    return int(value)


def _shown(value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
