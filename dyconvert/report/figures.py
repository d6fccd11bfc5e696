"""The pictures of correlation, cost, latency and fine-tuning runs."""

from collections.abc import Sequence
from typing import Any

from dyconvert.analysis.ablation import Ablation, RunCurves, Setting
from dyconvert.analysis.correlation import BANDS, BINS, Correlation, ExpertCorrelation, LayerCorrelation
from dyconvert.analysis.cost import BlockCost
from dyconvert.analysis.resolution import Resolution
from dyconvert.report.style import COLOUR, SERIES, WIDTH

# A picture has at most this many rows. If there are more, they are taken at even intervals.
ROWS = 40

BAND_LABELS = {"strong": "strong, ≥ 0.6", "middle": "middle, ≥ 0.4", "weak": "weak, ≥ 0.2", "none": "none"}
MODELS = {
    "original": ("original", "original"),
    "dynamic": ("dynamic", "dynamic"),
    "narrow": ("static, narrow", "narrow"),
    "static": ("this model", "dynamic"),
}


def new(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """An empty picture of the usual width, without pyplot's global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def shown_rows(items: Sequence[Any]) -> list[Any]:
    """At most ROWS of the items, taken at even intervals."""
    count = min(len(items), ROWS)
    return [items[i * len(items) // count] for i in range(count)]


def bands(layer: LayerCorrelation, name: str) -> Any:
    """The shares of strong, middle, weak and no correlation (DyNet, figure 6)."""
    figure, axes = new(2.5)
    layers = {name: layer.model} | ({"original": layer.original} if layer.original else {})
    layers = dict(sorted(layers.items(), key=lambda item: item[0] != "original"))
    height = 0.8 / len(layers)
    for number, (key, correlation) in enumerate(layers.items()):
        label, colour = MODELS[key]
        values = [100 * correlation.bands[band] for band in BANDS]
        y = [i + (number - (len(layers) - 1) / 2) * height for i in range(len(BANDS))]
        bars = axes.barh(y, values, height * 0.9, color=COLOUR[colour], label=label)
        axes.bar_label(bars, [f"{value:.1f}" for value in values], padding=3, fontsize=7.5, color=COLOUR["muted"])
    axes.set_yticks(range(len(BANDS)), [BAND_LABELS[band] for band in BANDS])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 112)
    axes.set_xticks([0, 25, 50, 75, 100])
    axes.set_xlabel("share of pairs of feature maps, %")
    if len(layers) > 1:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 0.3))
    return figure


def distribution(layer: LayerCorrelation, name: str) -> Any:
    """The correlations of all pairs, as a distribution."""
    figure, axes = new(2.5)
    edges = [-1 + 2 * i / BINS for i in range(BINS + 1)]
    for key, correlation in (("original", layer.original), (name, layer.model)):
        if correlation is not None and correlation.pairs:
            label, colour = MODELS[key]
            shares = [100 * count / correlation.pairs for count in correlation.histogram]
            axes.stairs(shares, edges, color=COLOUR[colour], label=label, linewidth=1.6)
            axes.stairs(shares, edges, color=COLOUR[colour], fill=True, alpha=0.15)
    for edge in (0.2, 0.4, 0.6):
        for sign in (-1, 1):
            axes.axvline(sign * edge, color=COLOUR["muted"], linewidth=0.6, linestyle=(0, (2, 3)))
    axes.set_xlim(-1, 1)
    axes.set_xticks([-1, -0.5, 0, 0.5, 1])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("Pearson's r of two feature maps")
    axes.set_ylabel("share of pairs, %")
    axes.legend(loc="upper right", fontsize=8)
    return figure


def experts(correlations: Sequence[ExpertCorrelation]) -> Any:
    """How alike each conv's experts are: the bands, stacked."""
    shown = shown_rows(correlations)
    figure, axes = new(0.9 + 0.19 * len(shown))
    _stacked_bands(axes, [(correlation.conv, correlation.between) for correlation in shown])
    axes.set_xlabel("share of pairs of experts' kernels, %")
    return figure


def _stacked_bands(axes: Any, rows: Sequence[tuple[str, Correlation]]) -> None:
    left = [0.0] * len(rows)
    for band in BANDS:
        values = [100 * correlation.bands[band] for _, correlation in rows]
        axes.barh(range(len(rows)), values, 0.75, left=left, color=COLOUR[band], label=band)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.set_yticks(range(len(rows)), [_short(name) for name, _ in rows], fontsize=7.5)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 100)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.figure.legend(loc="outside upper left", ncols=4, fontsize=8, columnspacing=1)


def latency(resolution: Resolution) -> Any:
    """Time of one image against the input's size."""
    from matplotlib.ticker import LogLocator

    figure, axes = new(2.7)
    names = [name for name in MODELS if any(name in at_size.seconds for at_size in resolution.sizes)]
    for name in names:
        label, colour = MODELS[name]
        sizes = [at_size.size for at_size in resolution.sizes]
        timings = [at_size.seconds[name] for at_size in resolution.sizes]
        axes.plot(sizes, [1e3 * t.median for t in timings], "o-", color=COLOUR[colour], label=label)
        low, high = [1e3 * t.low for t in timings], [1e3 * t.high for t in timings]
        axes.fill_between(sizes, low, high, color=COLOUR[colour], alpha=0.2, linewidth=0)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: "")
    _size_axis(axes, resolution)
    axes.set_ylabel("ms an image, log scale")
    axes.legend(loc="upper left")
    return figure


def reduced(resolution: Resolution) -> Any:
    """The latency-reduced ratio against the input's size (DyNet, figure 7), beside that of the multiply-adds."""
    figure, axes = new(2.7)
    sizes = [at_size.size for at_size in resolution.sizes]
    for name in ("dynamic", "static", "narrow"):
        if all(at_size.latency_reduced(name) is not None for at_size in resolution.sizes):
            label, colour = MODELS[name]
            time = [100 * at_size.latency_reduced(name) for at_size in resolution.sizes]
            counted = [100 * at_size.macs_reduced(name) for at_size in resolution.sizes]
            axes.plot(sizes, time, "o-", color=COLOUR[colour], label=f"{label}: latency")
            axes.plot(sizes, counted, "--", color=COLOUR[colour], label=f"{label}: MACs", linewidth=1.2)
    axes.axhline(0, color=COLOUR["muted"], linewidth=0.8)
    _size_axis(axes, resolution)
    axes.set_ylabel("saved against the original, %")
    axes.legend(loc="best", fontsize=7.5)
    return figure


def overhead(resolution: Resolution) -> Any:
    """The share of the dynamic model's time that predicting and mixing take."""
    figure, axes = new(2.7)
    sizes = [at_size.size for at_size in resolution.sizes]
    shares = {}
    for share in ("predicting", "mixing"):
        shares[share] = [100 * e.seconds[share].median / e.seconds["dynamic"].median for e in resolution.sizes]
    colours = [COLOUR["narrow"], COLOUR["dynamic"]]
    axes.stackplot(sizes, shares.values(), labels=list(shares), colors=colours, alpha=0.75)
    _size_axis(axes, resolution)
    axes.set_ylim(bottom=0)
    axes.margins(x=0)
    axes.set_ylabel("share of the time, %")
    axes.legend(loc="upper right")
    return figure


def _size_axis(axes: Any, resolution: Resolution) -> None:
    sizes = [at_size.size for at_size in resolution.sizes]
    # Labels of sizes that are close together would overlap.
    shown = [size for i, size in enumerate(sizes) if i == 0 or size - sizes[i - 1] >= (sizes[-1] - sizes[0]) / 12]
    axes.set_xticks(shown, [str(size) for size in shown])
    axes.set_xlabel("height and width of the image, pixels")


def costs(blocks: Sequence[BlockCost], field: str) -> Any:
    """Per block, before and after: "parameters", "macs" or "seconds"."""
    scale, unit = {"parameters": (1e3, "thousand parameters"), "macs": (1e6, "million multiply-adds")}.get(
        field, (1e-3, "ms an image")
    )
    known = [block for block in blocks if getattr(block.after, field) is not None]
    shown = shown_rows(known)
    figure, axes = new(0.9 + 0.24 * len(shown))
    pairs = any(block.before is not None for block in shown)
    for number, key in enumerate(("before", "after") if pairs else ("after",)):
        costs_of = [getattr(block, key) for block in shown]
        values = [(getattr(cost, field) or 0) / scale if cost is not None else 0 for cost in costs_of]
        offset = (number - 0.5) * 0.38 if pairs else 0
        colour = COLOUR["original" if key == "before" else "dynamic"]
        y = [i + offset for i in range(len(shown))]
        axes.barh(y, values, 0.36 if pairs else 0.6, color=colour, label=key if pairs else None)
    axes.set_yticks(range(len(shown)), [_short(block.name) for block in shown], fontsize=7.5)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(unit)
    if pairs:
        figure.legend(loc="outside upper left", ncols=2)
    return figure


def runs(ablation: Ablation) -> Any | None:
    """Top-1 of a sweep's runs after fine-tuning, with the standard deviation over seeds, against the original's."""
    rows = [setting for setting in ablation.settings if "finetuned" in setting.scores]
    if not rows:
        return None
    shown = shown_rows(rows)
    figure, axes = new(1.0 + 0.26 * len(shown))
    for y, setting in enumerate(shown):
        score = setting.scores["finetuned"]
        colour = COLOUR["original" if setting.static else "dynamic"]
        axes.errorbar(score.mean, y, xerr=score.deviation, fmt="o", color=colour, capsize=3)
    originals = {round(s.scores["original"].mean, 6) for s in shown if "original" in s.scores}
    for original in originals if len(originals) == 1 else ():
        axes.axvline(original, color=COLOUR["muted"], linestyle="--", linewidth=1, label="original")
        figure.legend(loc="outside upper left", fontsize=8)
    axes.set_yticks(range(len(shown)), [_short(setting.run) for setting in shown], fontsize=8)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("top-1 after fine-tuning, %; grey: static")
    return figure


def widths(ablation: Ablation) -> Any | None:
    """Static against dynamic at equal width, with the standard deviation over seeds; None if one of them is missing."""
    scored = [setting for setting in ablation.settings if "finetuned" in setting.scores]
    by_width = [setting for setting in scored if setting.width is not None]
    # Runs are narrowed to a width or to a share of the multiply-adds; one axis shows one of them.
    rows = by_width or [setting for setting in scored if setting.flops is not None]
    if not any(s.static for s in rows) or all(s.static for s in rows):
        return None
    figure, axes = new(2.7)
    for number, (label, chosen) in enumerate(_series(rows)):
        x = [s.width if by_width else s.flops for s in chosen]
        _score_line(axes, x, chosen, label, COLOUR[SERIES[number % len(SERIES)]])
    axes.set_xlabel("width, of the original's" if by_width else "multiply-adds, of the original's")
    axes.set_ylabel("top-1 after fine-tuning, %")
    axes.legend(fontsize=7.5)
    return figure


def group_sizes(ablation: Ablation) -> Any | None:
    """Top-1 against g, the number of experts; None with fewer than two."""
    rows = [s for s in ablation.settings if not s.static and s.g is not None and "finetuned" in s.scores]
    if len({s.g for s in rows}) < 2:
        return None
    figure, axes = new(2.7)
    keys = dict.fromkeys((s.recipe, s.method, s.width, s.flops) for s in rows)
    for number, key in enumerate(keys):
        chosen = [s for s in rows if (s.recipe, s.method, s.width, s.flops) == key]
        label = key[1] + (f", width {key[2]:g}" if key[2] is not None else "")
        label += f", {key[3]:.0%} of the MACs" if key[3] is not None else ""
        _score_line(axes, [s.g for s in chosen], chosen, label, COLOUR[SERIES[number % len(SERIES)]])
    for setting in ablation.settings:
        if setting.static and "finetuned" in setting.scores:
            mean = setting.scores["finetuned"].mean
            axes.axhline(mean, color=COLOUR["original"], linestyle="--", linewidth=1.2)
            axes.annotate(
                setting.run,
                (1, mean),
                (-2, 3),
                xycoords=("axes fraction", "data"),
                ha="right",
                textcoords="offset points",
                fontsize=7.5,
                color=COLOUR["muted"],
            )
    axes.set_xticks(sorted({s.g for s in rows}))
    axes.set_xlabel("g, experts per conv")
    axes.set_ylabel("top-1 after fine-tuning, %")
    axes.legend(fontsize=7.5)
    return figure


def _series(rows: Sequence[Setting]) -> list[tuple[str, list[Setting]]]:
    keys = dict.fromkeys((s.recipe, s.static, None if s.static else s.method, None if s.static else s.g) for s in rows)
    recipes = {s.recipe for s in rows}
    series = []
    for recipe, static, method, g in keys:
        chosen = [
            s for s in rows if s.recipe == recipe and s.static == static and (static or (s.method, s.g) == (method, g))
        ]
        label = "static" if static else f"{method}, g = {g}"
        series.append((label + (f" ({recipe})" if len(recipes) > 1 else ""), chosen))
    return series


def _score_line(axes: Any, x: Sequence[float], chosen: Sequence[Setting], label: str, colour: str) -> None:
    order = sorted(range(len(x)), key=lambda i: x[i])
    scores = [chosen[i].scores["finetuned"] for i in order]
    axes.errorbar(
        [x[i] for i in order],
        [score.mean for score in scores],
        yerr=[score.deviation for score in scores],
        fmt="o-",
        color=colour,
        capsize=3,
        label=label,
    )


def courses(run: RunCurves) -> list[tuple[str, Any]]:
    """A fine-tuning run's losses and its validation metric over the epochs: `(title, picture)`."""
    from matplotlib.ticker import MaxNLocator

    drawn = []
    for title, words in (("Validation", ("acc", "top1", "top-1", "miou", "metric")), ("Loss", ("loss",))):
        chosen = [c for c in run.courses if any(word in c.name.lower() for word in words) and len(c.values) > 1]
        # A metric that is logged per step and per epoch is shown once.
        chosen = [c for c in chosen if not c.name.endswith("_step")][: len(SERIES)]
        if not chosen:
            continue
        figure, axes = new(2.7)
        for number, course in enumerate(chosen):
            axes.plot(
                [epoch + 1 for epoch in course.epochs], course.values, color=COLOUR[SERIES[number]], label=course.name
            )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("epoch")
        axes.legend(fontsize=7.5)
        drawn.append((title, figure))
    return drawn


def _short(name: str, limit: int = 26) -> str:
    name = name or "(the model)"
    return name if len(name) <= limit else "…" + name[1 - limit :]
