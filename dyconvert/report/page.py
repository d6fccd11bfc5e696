"""Makes the page from an analysis and its pictures: one HTML file that needs no other file."""

import base64
import io
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from dyconvert.analysis.coefficients import ConvCoefficients
from dyconvert.analysis.findings import UNTRAINED
from dyconvert.analysis.images import ImageSet
from dyconvert.analysis.study import Analysis
from dyconvert.console import count
from dyconvert.report import coefficient_figures, figures
from dyconvert.report.steps import next_steps
from dyconvert.report.style import PALETTE

# Pixels of a picture's shorter side in the page.
THUMBNAIL = 64
USAGE = "Mean coefficients over images and channels; orange above, blue below where a conversion starts."
# Convs whose experts' images are shown.
SHOWN_CONVS = 3


@dataclass
class Drawing:
    """A picture of the page.

    Attributes:
        name: the name of its file.
        figure: matplotlib's figure.
        label: a description, for people who can't see it.
    """

    name: str
    title: str
    figure: Any
    caption: str = ""
    label: str = ""
    svg: str = field(default="", repr=False)


def drawings(analysis: Analysis) -> dict[str, list[Drawing]]:
    """The pictures of each section. A picture without data is left out."""
    mine = "dynamic" if analysis.dynamic else "static"
    sections: dict[str, list[Drawing]] = {
        "coefficients": [],
        "correlation": [],
        "cost": [],
        "resolution": [],
        "runs": [],
    }
    if analysis.coefficients is not None and analysis.coefficients.convs:
        sections["coefficients"] = _coefficients(analysis)
    for number, layer in enumerate(analysis.correlations):
        suffix = f"_{number + 1}" if number else ""
        sections["correlation"] += [
            Drawing(
                f"correlation_bands{suffix}",
                f"Feature maps of {layer.layer}",
                figures.bands(layer, mine),
                f"Bands of |r|, as in the paper's figure 6. The layer: {layer.why}.",
            ),
            Drawing(
                f"correlation{suffix}",
                "The same, as a distribution",
                figures.distribution(layer, mine),
                f"{layer.model.pairs:,} pairs of {layer.model.compared} feature maps, before batch norm.",
            ),
        ]
    if analysis.experts:
        sections["correlation"].append(
            Drawing(
                "experts",
                "Experts of a conv",
                figures.experts(analysis.experts),
                "How alike a conv's kernels are from expert to expert. Alike experts leave coefficients little to do.",
            )
        )
    if analysis.cost is not None:
        for name, title in (("macs", "Multiply-adds"), ("parameters", "Parameters"), ("seconds", "Time")):
            if any(getattr(block.after, name) is not None for block in analysis.cost.blocks):
                drawing = Drawing(f"cost_{name}", title, figures.costs(analysis.cost.blocks, name))
                sections["cost"].append(drawing)
    if analysis.resolution is not None:
        sections["resolution"] = _resolution(analysis)
    if analysis.ablation is not None:
        pairs = [
            ("ablation_runs", "All runs", figures.runs(analysis.ablation)),
            ("ablation_width", "Static against dynamic", figures.widths(analysis.ablation)),
            ("ablation_g", "Number of experts", figures.group_sizes(analysis.ablation)),
        ]
        caption = "Mean and standard deviation over the seeds."
        sections["runs"] = [Drawing(name, title, drawn, caption) for name, title, drawn in pairs if drawn is not None]
    if analysis.run is not None:
        sections["runs"] += [
            Drawing(f"run_{title.lower()}", title, figure, "Over the epochs of fine-tuning.")
            for title, figure in figures.courses(analysis.run)
        ]
    rows = {"coefficients": len(analysis.coefficients.convs) if analysis.coefficients else 0}
    rows |= {name: rows["coefficients"] for name in ("variation", "usage", "axes")} | {"experts": len(analysis.experts)}
    rows |= {f"cost_{name}": len(analysis.cost.blocks) for name in ("macs", "parameters", "seconds") if analysis.cost}
    rows["classes"] = len(analysis.classes)
    for section in sections.values():
        for drawing in section:
            if (count := rows.get(drawing.name, 0)) > figures.ROWS:
                drawing.caption += f" Shown are {figures.ROWS} of {count}, at even intervals; numbers/ has all of them."
            drawing.label = drawing.label or f"{drawing.title}. {drawing.caption}"
    return sections


def _coefficients(analysis: Analysis) -> list[Drawing]:
    coefficients = analysis.coefficients
    drawn = [
        Drawing(
            "coefficients",
            "Distribution",
            coefficient_figures.ridges(coefficients),
            "All coefficients of each conv, over all images and output channels; as high as the root of their density.",
        ),
        Drawing(
            "variation",
            "What varies",
            coefficient_figures.variation(coefficients),
            "How far coefficients move from image to image; the number is the share between the classes' means.",
        ),
        Drawing("usage", "Which experts are used", coefficient_figures.usage(coefficients), USAGE),
    ]
    if any(conv.axes for conv in coefficients.convs):
        caption = (
            "Standard deviation over the images of what a predictor gives along each axis: the experts' coefficients, "
            "and the factors of output channels, input channels and kernel positions, which start at 1."
        )
        drawn.append(Drawing("axes", "Four kinds of attention", coefficient_figures.axes(coefficients), caption))
    if all(conv.varies < UNTRAINED for conv in coefficients.convs):
        # A model as it was converted has coefficients that don't vary.
        drawn = [drawing for drawing in drawn if drawing.name != "variation"]
    conv = most_by_class(analysis)
    if conv is not None:
        picture = coefficient_figures.class_map(conv, analysis.classes)
        if picture is not None:
            caption = f"Per class, in {conv.name}: where each coefficient's mean lies from its mean over all images."
            drawn.append(Drawing("classes", "What a class changes", picture, caption))
    return drawn


def most_by_class(analysis: Analysis) -> ConvCoefficients | None:
    """The conv whose coefficients follow the classes most."""
    known = [c for c in analysis.coefficients.convs if c.between_classes is not None and not c.is_constant]
    return max(known, key=lambda conv: conv.between_classes, default=None)


def _resolution(analysis: Analysis) -> list[Drawing]:
    resolution = analysis.resolution
    clock = "CPU time" if resolution.clock == "cpu" else "Wall time"
    threads = f"{resolution.threads} thread{'s' if resolution.threads > 1 else ''}"
    drawn = [
        Drawing(
            "latency",
            "Latency",
            figures.latency(resolution),
            f"{clock}, {threads}, medians in turns; shaded: quartiles.",
        )
    ]
    if len(resolution.sizes) > 1 and all(len(at_size.macs) > 1 for at_size in resolution.sizes):
        caption = "1 − L/L of the original, as in the paper's figure 7. Below zero, it takes longer."
        drawn.append(Drawing("latency_reduced", "Saved", figures.reduced(resolution), caption))
    if len(resolution.sizes) > 1 and all(at_size.overhead is not None for at_size in resolution.sizes):
        caption = "All predictors, and all kernels mixed, each timed alone, over the whole model's time."
        drawn.append(Drawing("overhead", "Predicting and mixing", figures.overhead(resolution), caption))
    return drawn


@dataclass
class Gallery:
    """The images that drive the experts of one conv most: for each expert `(data URI, class, share of the mixture)`."""

    conv: str
    experts: list[list[tuple[str, str, float]]]


def galleries(analysis: Analysis, images: ImageSet | None) -> list[Gallery]:
    """The images that drive the experts of a few convs most: those that follow the classes most."""
    if images is None or analysis.coefficients is None:
        return []
    convs = [conv for conv in analysis.coefficients.convs if not conv.is_constant and any(e.top for e in conv.experts)]
    convs.sort(key=lambda conv: -(conv.between_classes or conv.spread))
    pictures: dict[int, str] = {}

    def shown(index: int) -> str:
        if index not in pictures:
            pictures[index] = _thumbnail(images, index)
        return pictures[index]

    def called(index: int) -> str:
        label = int(images.labels[index])
        return images.classes[label] if label >= 0 and images.classes else ""

    return [
        Gallery(
            conv.name,
            [[(shown(top.image), called(top.image), top.share) for top in expert.top] for expert in conv.experts],
        )
        for conv in convs[:SHOWN_CONVS]
    ]


def _thumbnail(images: ImageSet, index: int) -> str:
    picture = images.picture(index)
    picture.thumbnail((2 * THUMBNAIL, 2 * THUMBNAIL))
    buffer = io.BytesIO()
    # Small pictures as PNG; a photograph would be ten times as large as PNG.
    photograph = max(picture.size) > THUMBNAIL
    picture.save(buffer, "JPEG" if photograph else "PNG", **({"quality": 80} if photograph else {}))
    kind = "jpeg" if photograph else "png"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def render(analysis: Analysis, sections: dict[str, list[Drawing]], shown: list[Gallery]) -> str:
    """The page as HTML."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"count": count, "percent": lambda share: f"{100 * share:.1f} %", "size": _size}
    text = resources.files("dyconvert.report").joinpath("template.html").read_text(encoding="utf-8")
    return environment.from_string(text).render(
        a=analysis,
        sections=sections,
        galleries=shown,
        facts=facts(analysis),
        light={name: pair[0] for name, pair in PALETTE.items()},
        dark={name: pair[1] for name, pair in PALETTE.items()},
        temperatures=_temperatures(analysis),
        steps=next_steps(analysis),
        mine="dynamic" if analysis.dynamic else "static",
        dead=_dead(analysis),
    )


def facts(analysis: Analysis) -> list[tuple[str, str, str]]:
    """The figures at the head of the page: `(name, the model's value, the original's value or a remark)`."""
    rows = []
    if analysis.accuracy is not None:
        ours, theirs = analysis.accuracy.model, analysis.accuracy.original
        remark = f"{ours.right:,} of {ours.images:,} (95 %: {ours.low:.1f} to {ours.high:.1f})"
        remark += f"; original {theirs.percent:.2f} %, {theirs.right:,}" if theirs else ""
        rows.append(("top-1", f"{ours.percent:.2f} %", remark))
    if analysis.cost is not None:
        before, after = analysis.cost.before, analysis.cost.after
        for what, field in (("parameters", "parameters"), ("multiply-adds", "macs")):
            value, was = getattr(after, field), getattr(before, field) if before else None
            if value is not None:
                rows.append((what, count(value), f"original {count(was)}" if was else ""))
        if after.seconds is not None:
            was = f"original {_ms(before.seconds)}" if before and before.seconds else ""
            rows.append(("one image", _ms(after.seconds), was))
    if analysis.dynamic:
        converted = len(analysis.plan.converted)
        method = analysis.plan.method
        rows.append(("dynamic convs", f"{converted} of {len(analysis.plan.convs)}", f"{method.name}, g = {method.g}"))
    return rows


def _temperatures(analysis: Analysis) -> str:
    if analysis.coefficients is None or not analysis.coefficients.convs:
        return ""
    temperatures = sorted({conv.temperature for conv in analysis.coefficients.convs})
    return f"{temperatures[0]:g}" if len(temperatures) == 1 else f"{temperatures[0]:g} to {temperatures[-1]:g}"


def _dead(analysis: Analysis) -> dict[str, int]:
    convs = analysis.coefficients.convs if analysis.coefficients else []
    return {
        "experts": sum(conv.g for conv in convs),
        "never used": sum(len(conv.unused) for conv in convs),
        "saturated": sum(conv.is_saturated for conv in convs),
        "constant": sum(conv.is_constant for conv in convs),
    }


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1e3 * seconds:.2f} ms" if seconds < 0.1 else f"{1e3 * seconds:.0f} ms"


def _size(shape: list[int]) -> str:
    return " × ".join(map(str, shape))
