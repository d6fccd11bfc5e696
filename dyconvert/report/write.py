"""write_report: a directory with the page, its pictures and its numbers, all of it or nothing."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from dyconvert.analysis.images import ImageSet
from dyconvert.analysis.study import Analysis
from dyconvert.errors import DyconvertError
from dyconvert.files import as_path, held, private_folder, replace_directory, said
from dyconvert.installation import install_command
from dyconvert.limits import JSON_BYTES, parse_json, read_text

PAGE, NUMBERS = "report.html", "report.json"


def check_extra() -> None:
    """Refuse to begin without what draws.

    Raises:
        DyconvertError: the extra `report` isn't installed.
    """
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise DyconvertError(
            f"Reports are drawn with {error.name}, which isn't installed. Run `{install_command('report')}`."
        ) from error


def check_directory(directory: Path, force: bool = False) -> None:
    """Refuse a directory that holds something already.

    Raises:
        DyconvertError: it is a file, holds other files, or a report and `force` is not given.
    """
    try:
        above = next((parent for parent in directory.parents if parent.exists()), None)
        if (directory.exists() and not directory.is_dir()) or (above is not None and not above.is_dir()):
            raise DyconvertError(
                f"{directory} can't be made: it, or what it stands in, is a file. Choose another: `output=...`."
            )
        if not directory.exists() or not held(directory):
            return
    except (OSError, ValueError) as error:
        raise DyconvertError(f"{directory} can't be used: {error}. Choose another: `output=...`.") from None
    if not written_before(directory):
        raise DyconvertError(f"{directory} holds other files. Choose another: `output=...`.")
    if not force:
        raise DyconvertError(
            f"{directory} holds a report already. Replace it with `force=True`, or choose another: `output=...`."
        )


def written_before(directory: Path) -> list[str]:
    """The files of a report that we wrote into a directory, as its report.json lists them; none if it has no report."""
    try:
        content = parse_json(read_text(directory / NUMBERS, JSON_BYTES))
        listed = content.get("files") if isinstance(content, dict) else None
    except (OSError, ValueError):
        return []
    if isinstance(listed, list):
        return [name for name in listed if isinstance(name, str)]
    # Before they were listed, a report was these two and pictures and numbers, all of known kinds.
    if not isinstance(content, dict) or not {"conditions", "findings", "dynamic"} <= content.keys():
        return []
    kinds = (("figures", (".svg", ".png")), ("numbers", (".csv",)))
    files = [
        f"{folder}/{file.name}"
        for folder, suffixes in kinds
        if (directory / folder).is_dir() and not (directory / folder).is_symlink()
        for file in (directory / folder).iterdir()
        if file.suffix in suffixes
    ]
    return [PAGE, NUMBERS, *files]


def write_report(
    analysis: Analysis,
    directory: str | Path,
    *,
    images: ImageSet | None = None,
    force: bool = False,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> Path:
    """Write an analysis as a report: `report.html`, which needs no other file, `figures/` as SVG and PNG,
    `report.json` and `numbers/` as CSV.

    Args:
        analysis: what :func:`~dyconvert.analysis.study.analyse` returned.
        directory: made if need be. A report that stands there is replaced, with `force`, when the new one is complete.
        images: those that were analysed, to show the ones that drive an expert most. None: they aren't shown.

    Returns:
        The page.

    Raises:
        DyconvertError: the extra `report` isn't installed; the directory holds something else, or can't be written.
    """
    check_extra()
    directory = as_path(directory, DyconvertError)
    check_directory(directory, force)
    import matplotlib as mpl

    from dyconvert.report import page
    from dyconvert.report.numbers import tables
    from dyconvert.report.style import for_page, settings, to_png, to_svg

    with said(directory, DyconvertError):
        directory.parent.mkdir(parents=True, exist_ok=True)
        with private_folder(directory.parent) as folder:
            made = folder / directory.name
            for name in ("figures", "numbers"):
                (made / name).mkdir(parents=True)
            with mpl.rc_context(cast(Any, settings())), warnings.catch_warnings():
                # No font here has the script of this text; the page's own text shows it.
                warnings.filterwarnings("ignore", message="Glyph .* missing from")
                sections = page.drawings(analysis)
                drawn = [drawing for section in sections.values() for drawing in section]
                for done, drawing in enumerate(drawn):
                    if progress is not None:
                        progress("drawing", done, len(drawn))
                    # Laid out once, for both files.
                    drawing.figure.draw_without_rendering()
                    drawing.figure.set_layout_engine("none")
                    svg = to_svg(drawing.figure, drawing.name)
                    _write(made / "figures" / f"{drawing.name}.svg", svg)
                    (made / "figures" / f"{drawing.name}.png").write_bytes(to_png(drawing.figure))
                    drawing.svg = for_page(svg, drawing.label)
            html = page.render(analysis, sections, page.galleries(analysis, images))
            _write(made / PAGE, html)
            for name, text in tables(analysis).items():
                _write(made / "numbers" / name, text)
            files = sorted(each.relative_to(made).as_posix() for each in made.rglob("*") if each.is_file())
            numbers = {**json.loads(analysis.model_dump_json()), "files": [*files, NUMBERS]}
            _write(made / NUMBERS, json.dumps(numbers) + "\n")
            replace_directory(made, directory, written_before(directory), DyconvertError)
    return directory / PAGE


def _write(file: Path, text: str) -> None:
    # Names of folders may be bytes that are no text.
    file.write_text(text, encoding="utf-8", errors="replace")
