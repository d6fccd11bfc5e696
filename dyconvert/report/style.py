"""The palette: in a picture's file a colour has its light value; in the page it is a CSS variable with two values."""

import io
import re
from typing import Any

_OTHER_SCRIPTS = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "Hiragino Sans", "Microsoft YaHei", "Noto Sans Arabic",
    "Noto Sans Devanagari",
)  # fmt: skip

# name: (light, dark). No two light values are equal, because they identify the colour in an SVG.
PALETTE = {
    "ink": ("#1d2433", "#e6e9ef"),
    "muted": ("#667085", "#98a2b3"),
    "line": ("#d5d9e2", "#343b4a"),
    "paper": ("#ffffff", "#171b24"),
    "original": ("#8d97a8", "#8b96a9"),
    "dynamic": ("#2364d2", "#6ea2ff"),
    "narrow": ("#c2660c", "#f0a35e"),
    "strong": ("#17377a", "#a9c7ff"),
    "middle": ("#4d7fd6", "#5f90e6"),
    "weak": ("#a3bfec", "#35588f"),
    "none": ("#dde6f6", "#252f42"),
    "warning": ("#b42318", "#ff8a7a"),
    "good": ("#0f7b52", "#5fd0a2"),
}
COLOUR = {name: light for name, (light, _) in PALETTE.items()}
# Colours of a plot's lines, in this order. They differ in lightness as well as in hue.
SERIES = ("dynamic", "narrow", "good", "strong", "warning", "original", "middle", "muted")

WIDTH = 3.5  # inches: fits a phone's screen; three fit side by side on a larger one


def _families() -> list[str]:
    """Fonts to search for a character, in this order: names of classes may be in any script."""
    from matplotlib import font_manager

    there = {font.name for font in font_manager.fontManager.ttflist}
    return ["sans-serif", *(name for name in _OTHER_SCRIPTS if name in there)]


def settings() -> dict[str, Any]:
    """matplotlib's settings for all pictures."""
    return {
        "font.size": 8.5,
        "font.family": _families(),
        # A dollar sign in a class's name doesn't start a formula.
        "text.parse_math": False,
        "text.color": COLOUR["ink"],
        "axes.labelcolor": COLOUR["muted"],
        "axes.edgecolor": COLOUR["line"],
        "axes.titlesize": 9,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": COLOUR["line"],
        "grid.linewidth": 0.6,
        "xtick.color": COLOUR["line"],
        "ytick.color": COLOUR["line"],
        "xtick.labelcolor": COLOUR["muted"],
        "ytick.labelcolor": COLOUR["ink"],
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "legend.frameon": False,
        "legend.labelcolor": COLOUR["ink"],
        "legend.handlelength": 1.2,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "svg.fonttype": "none",
        "lines.linewidth": 1.8,
        "lines.markersize": 4,
    }


def to_svg(figure: Any, name: str) -> str:
    """The picture as SVG, the same at every run. `name` makes the ids in it differ from another picture's."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def to_png(figure: Any) -> bytes:
    """The picture as PNG, on white."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor="white")
    return buffer.getvalue()


def for_page(svg: str, label: str) -> str:
    """An SVG for the page: it takes the page's colours and the column's width."""
    svg = svg[svg.index("<svg") :]
    by_light = {light: name for name, (light, _) in PALETTE.items()}
    svg = re.sub(
        r"#[0-9a-f]{6}\b", lambda m: f"var(--{by_light[m[0]]})" if m[0] in by_light else m[0], svg, flags=re.IGNORECASE
    )
    head, _, body = svg.partition(">")
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    label = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    # The page doesn't need its metadata.
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    return f'{head} role="img" aria-label="{label}">{body}'
