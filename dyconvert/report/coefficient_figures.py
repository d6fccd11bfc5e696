"""The pictures of the coefficients."""

from typing import Any

from dyconvert.analysis.coefficients import BINS, Coefficients, ConvCoefficients
from dyconvert.methods import AXES
from dyconvert.report.figures import _short, new, shown_rows
from dyconvert.report.style import COLOUR


def ridges(coefficients: Coefficients) -> Any:
    """The distribution of each conv's coefficients, one above the other, over the range that they take."""
    shown = shown_rows(coefficients.convs)
    figure, axes = new(1.0 + 0.26 * len(shown))
    low, high = _range(shown)
    for number, conv in enumerate(shown):
        total = [sum(bins) for bins in zip(*(e.histogram for e in conv.experts), strict=True)]
        largest = max(total) or 1
        y = [number - 1.35 * (count / largest) ** 0.5 for count in total]
        x = [(i + 0.5) / BINS for i in range(BINS)]
        axes.fill_between(x, number, y, step="mid", color=COLOUR["dynamic"], alpha=0.35, linewidth=0, zorder=2 + number)
        axes.step(x, y, where="mid", color=COLOUR["dynamic"], linewidth=1, zorder=2 + number)
    axes.set_xlim(low, high)
    axes.set_ylim(len(shown) - 0.6, -1.6)
    axes.set_yticks(range(len(shown)), [_short(conv.name) for conv in shown], fontsize=7.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("coefficient")
    return figure


def variation(coefficients: Coefficients) -> Any:
    """How far coefficients vary from image to image, between the classes' means and within the classes."""
    shown = shown_rows(coefficients.convs)
    figure, axes = new(0.95 + 0.2 * len(shown))
    y = range(len(shown))
    between = [conv.spread * (conv.between_classes or 0) for conv in shown]
    within = [conv.spread - between_mean for conv, between_mean in zip(shown, between, strict=True)]
    known = any(conv.between_classes is not None for conv in shown)
    if known:
        axes.barh(y, between, 0.72, color=COLOUR["narrow"], label="between classes")
    axes.barh(y, within, 0.72, left=between, color=COLOUR["dynamic"], label="within a class" if known else None)
    if known:
        for i, conv in enumerate(shown):
            share = f"{conv.between_classes:.0%}" if conv.between_classes is not None else ""
            axes.annotate(
                share,
                (conv.spread, i),
                (3, 0),
                textcoords="offset points",
                va="center",
                fontsize=7.5,
                color=COLOUR["muted"],
            )
        figure.legend(loc="outside upper left", ncols=2)
    axes.set_yticks(y, [_short(conv.name) for conv in shown], fontsize=7.5)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.14)
    axes.set_xlim(left=0)
    axes.locator_params(axis="x", nbins=4)
    axes.set_xlabel("standard deviation over the images")
    return figure


def usage(coefficients: Coefficients) -> Any:
    """The mean coefficient of each conv's experts over all images; experts that are never used are marked."""
    import numpy as np

    shown = shown_rows(coefficients.convs)
    experts = max(conv.g for conv in shown)
    figure, axes = new(0.95 + 0.2 * len(shown))
    apart = np.zeros((len(shown), experts))
    for row, conv in enumerate(shown):
        base = 1 / conv.g if conv.activation == "softmax" else 0.5
        for column, expert in enumerate(conv.experts):
            if expert.used:
                apart[row, column] = np.clip(expert.mean / base - 1, -1, 1)
                text, colour = f"{expert.mean:.2f}".removeprefix("0"), COLOUR["ink"]
            else:
                text, colour = "✕", COLOUR["warning"]
            axes.annotate(text, (column, row), ha="center", va="center", fontsize=7.5, color=colour)
    axes.imshow(_painted(apart), aspect="auto", interpolation="nearest")
    axes.set_xticks(range(experts), [str(i + 1) for i in range(experts)])
    axes.set_yticks(range(len(shown)), [_short(conv.name) for conv in shown], fontsize=7.5)
    axes.grid(visible=False)
    axes.set_xlabel("expert; ✕: never used")
    return figure


def axes(coefficients: Coefficients) -> Any:
    """How far each axis of each conv's mixture varies: experts, outputs, inputs and positions."""
    import numpy as np

    shown = shown_rows(coefficients.convs)
    figure, plot = new(0.95 + 0.2 * len(shown))
    values = np.full((len(shown), len(AXES)), np.nan)
    for row, conv in enumerate(shown):
        deviations = {"experts": conv.spread} | {axis: use.spread for axis, use in conv.axes.items()}
        for column, axis in enumerate(AXES):
            if axis in deviations:
                values[row, column] = deviations[axis]
            text = f"{deviations[axis]:.3f}".removeprefix("0") if axis in deviations else "–"
            plot.annotate(text, (column, row), ha="center", va="center", fontsize=7.5, color=COLOUR["ink"])
    plot.imshow(_painted(np.nan_to_num(values) / max(np.nanmax(values), 1e-6)), aspect="auto", interpolation="nearest")
    plot.set_xticks(range(len(AXES)), AXES)
    plot.set_yticks(range(len(shown)), [_short(conv.name) for conv in shown], fontsize=7.5)
    plot.grid(visible=False)
    plot.set_xlabel("standard deviation over the images; –: none is given")
    return figure


def class_map(conv: ConvCoefficients, classes: list[str]) -> Any | None:
    """How far each class's coefficients in one conv are from their mean over all images."""
    import numpy as np

    rows = [(classes[number], row) for number, row in conv.signature.items()]
    if len(rows) < 2:
        return None
    shown = shown_rows(rows)
    values = np.array([row for _, row in shown])
    # Experts side by side. Within an expert, channels are ordered by the class for which they are highest.
    experts = np.split(values, conv.g, axis=1)
    ordered = [expert[:, np.lexsort((-expert.max(0), expert.argmax(0)))] for expert in experts]
    figure, axes = new(1.0 + 0.2 * len(shown))
    limit = max(float(np.abs(values).max()), 1e-6)
    image = np.concatenate(ordered, 1)
    axes.imshow(_painted(image / limit), aspect="auto", interpolation="nearest")
    width = experts[0].shape[1]
    axes.set_yticks(range(len(shown)), [_short(name, 20) for name, _ in shown], fontsize=7.5)
    axes.set_xticks([width * (i + 0.5) - 0.5 for i in range(conv.g)], [str(i + 1) for i in range(conv.g)])
    for i in range(1, conv.g):
        axes.axvline(width * i - 0.5, color=COLOUR["paper"], linewidth=1.6)
    axes.grid(visible=False)
    per = "its output channels side by side" if width > 1 else "one coefficient each"
    axes.set_xlabel(f"expert, {per}")
    axes.set_title(
        f"−{limit:.1f} to +{limit:.1f} standard deviations, blue to orange",
        fontweight="normal",
        fontsize=8,
        color=COLOUR["muted"],
    )
    return figure


def _painted(values: Any) -> Any:
    """Colours for -1 to 1: from blue over transparent to orange, which suits a light page and a dark one."""
    import numpy as np

    image = np.zeros((*values.shape, 4))
    image[values < 0, :3] = np.array([0x2F, 0x74, 0xE8]) / 255
    image[values >= 0, :3] = np.array([0xE0, 0x7A, 0x16]) / 255
    image[..., 3] = np.abs(values) ** 0.8
    return image


def _range(convs: list[ConvCoefficients]) -> tuple[float, float]:
    low = min(e.smallest for conv in convs for e in conv.experts)
    high = max(e.largest for conv in convs for e in conv.experts)
    margin = max((high - low) * 0.05, 2 / BINS)
    return max(low - margin, -0.02), min(high + margin, 1.02)
