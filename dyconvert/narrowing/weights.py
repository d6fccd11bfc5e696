"""Gives the narrowed model its weights, solved if that is better than merged, and measures their errors."""

from collections import Counter
from collections.abc import Callable

import torch
from torch import nn

from dyconvert.errors import some
from dyconvert.narrowing.calibrate import Samples
from dyconvert.narrowing.checks import bare
from dyconvert.narrowing.cut import Folds
from dyconvert.narrowing.fit import MERGED, SOLVED
from dyconvert.narrowing.images import Images
from dyconvert.narrowing.outputs import output_error
from dyconvert.narrowing.positions import Positions
from dyconvert.narrowing.reconstruct import reconstruct
from dyconvert.narrowing.record import Narrowing

# A larger error gives a warning. It is the share of the variance that isn't reproduced: 1 is the error of a constant.
BOUND = 0.75
# If a larger share of the multiply-adds is left, narrowing has hardly any effect.
_MUCH_LEFT = 0.9
# A smaller error comes from rounding and the ridge.
_ROUNDING = 1e-6


@torch.no_grad()
def give_weights(
    original: nn.Module,
    narrowed: nn.Module,
    images: Images,
    samples: Samples | None,
    folds: Folds,
    positions: Positions | None,
    record: Narrowing,
    tell: Callable[[str, int, int], None],
) -> None:
    """Solve the narrowed model's weights, if the init says so and it is better than merging; record the errors.

    Args:
        record: its `init` is the requested one, and afterwards the one that was used.
    """
    runner = bare(narrowed)
    record.error = output_error(original, runner, images)
    if record.init == SOLVED and not record.held_out:
        record.warnings.append("one calibration image can't tell how good solved weights are, so all are merged")
        record.init = MERGED
    if record.init == SOLVED:
        merged = [(t, t.clone()) for t in (*narrowed.parameters(), *narrowed.buffers())]
        record.merged_error = record.error
        record.layers = reconstruct(runner, images, samples, folds, positions, lambda *at: tell("solving layers", *at))
        record.error = output_error(original, runner, images)
        if record.error is not None and record.merged_error is not None and record.error > record.merged_error:
            for t, value in merged:
                t.copy_(value)
            if record.error > _ROUNDING:
                record.warnings.append(
                    f"merging is better than least squares here (an error of {record.merged_error:.3g} instead of "
                    f"{record.error:.3g}), so all weights are merged"
                )
            record.error, record.layers, record.init = record.merged_error, [], MERGED
    _warn_of_errors(record)


def warn_of_width(record: Narrowing) -> None:
    """Add a warning if hardly any channels could be narrowed."""
    share = record.width**2 if record.width is not None else record.flops
    if record.macs > _MUCH_LEFT > share:
        reasons = Counter(group.kept.rpartition(": ")[2] for group in record.groups if group.kept)
        named = "; ".join(f"{count} since {why}" for why, count in reasons.most_common(3))
        record.warnings.append(
            f"{record.macs:.1%} of the multiply-adds are left: {reasons.total()} of {len(record.groups)} groups of "
            f"channels are kept, {named}"
        )


def _warn_of_errors(record: Narrowing) -> None:
    if record.error is not None and record.error > BOUND:
        record.warnings.append(f"the outputs' error on held-out images is {record.error:.3g}, above {BOUND:g}")
    bad = sorted(
        (layer for layer in record.layers if layer.error is not None and layer.error > BOUND),
        key=lambda layer: -layer.error,
    )
    if bad:
        named = some([f"{layer.name} ({layer.error:.3g})" for layer in bad], 3)
        record.warnings.append(f"{len(bad)} of {len(record.layers)} layers have an error above {BOUND:g}: {named}")
