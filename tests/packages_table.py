"""The part of docs/coverage.md about models of packages: what was done with each after its conversion."""

import torch
from packages_covering import CLOSE, ONNX, TRAINING, Row


def exponent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0e}" if value else "0"


def line(row: Row) -> str:
    onnx = exponent(row.onnx) + (" (one batch size)" if row.onnx is not None and "onnx" in row.refused else "")
    said = [*(f"**{problem}**" for problem in row.problems), *(f"{count} {why}" for why, count in row.skipped.items())]
    said += [f"{what}: {_first_sentence(why)}" for what, why in row.refused.items()]
    if row.static_exports is False:
        said.append("the static model isn't exported either")
    cells = (
        row.case,
        row.convs,
        row.converted,
        row.blocks,
        row.own,
        exponent(row.eval) + (" (float32)" if row.precision == "float32" else ""),
        exponent(row.training),
        exponent(row.loaded),
        exponent(row.fused) + (f" ({row.norms})" if row.norms else ""),
        onnx,
        _as_text("; ".join(said)),
    )
    return f"| {' | '.join(map(str, cells))} |"


def _as_text(said: str) -> str:
    """Errors quote code, whose bars and brackets would be a table's and a link's."""
    return said.replace("|", "/").replace("[", "\\[").replace("]", "\\]")


def _first_sentence(text: str) -> str:
    return text.split(". ")[0].rstrip(".")


def section(rows: list[Row], missing: list[str]) -> list[str]:
    """The lines of the section."""
    packages = {row.case.partition(":")[0] for row in rows}
    wrong = [row.case for row in rows if row.problems]
    compared = [row for row in rows if row.eval is not None]
    exported = [row for row in rows if row.onnx is not None]
    fused = [row for row in rows if row.norms]
    lines = [
        "## Models of packages",
        "",
        f"{len(rows)} models of {len(packages)} packages that pip installs, small, with random weights, made by "
        "`python tests/make_packages.py` in an environment with `tests/packages.txt`.",
        "",
        "- **eval**, **train**: the outputs before and after; in training also all gradients and buffers of a step, "
        "which an optimizer then takes. The largest difference, relative to the largest number; in float64 it must be "
        f"below {CLOSE[torch.float64]:.0e} and {TRAINING[torch.float64]:.0e}.",
        "- **loaded**: a model with trained predictors, saved, and loaded onto one with other weights. **fused**: "
        "after `fuse`, with the number of batch norms that were folded.",
        "- **ONNX**: onnxruntime's outputs from torch's at a batch of three, exported with a batch of two, in float32; "
        f"below {ONNX:.0e}. *(one batch size)*: exported with a batch of three, since it can't be left open.",
        "- With coefficients that follow the image, each image's output was also as when it is run alone.",
        "- The last column says what stays static, and what dyconvert refuses by name.",
        "",
        f"{len(compared)} models were converted and compared: {sum(not row.problems for row in compared)} of them "
        "are exact in all of this, but for what is refused by name. "
        f"{len(fused)} have batch norms that were folded; {len(exported)} ran in onnxruntime.",
        "",
        "| model | convs | converted | blocks | own | eval | train | loaded | fused | ONNX | static or refused, why |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|",
        *(line(row) for row in rows),
    ]
    if wrong:
        lines += ["", f"Problems: {', '.join(wrong)}."]
    if missing:
        lines += ["", f"Not measured yet: {', '.join(missing)}."]
    return lines
