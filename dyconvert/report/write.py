"""write_report: writes the page, its pictures and its numbers into a directory: all of them, or none."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from dyconvert.analysis.images import ImageSet
from dyconvert.analysis.study import Analysis
from dyconvert.errors import DyconvertError
from dyconvert.files import names_in, private_folder, replace_directory, write_errors_as
from dyconvert.installation import install_command
from dyconvert.limits import JSON_BYTES, parse_json, read_text
from dyconvert.paths import as_path

PAGE, NUMBERS = "report.html", "report.json"


def check_extra() -> None:
    """Check that the packages that draw are installed.

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
    """Check that a report may be written to a directory.

    Raises:
        DyconvertError: it is a file, holds other files, or a report and `force` is not given.
    """
    try:
        above = next((parent for parent in directory.parents if parent.exists()), None)
        if (directory.exists() and not directory.is_dir()) or (above is not None and not above.is_dir()):
            raise DyconvertError(
                f"{directory} can't be made: it, or what it stands in, is a file. Choose another: `output=...`."
            )
        if not directory.exists() or not names_in(directory):
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
    """The files of the report in a directory, as its report.json lists them; empty if it has no report."""
    try:
        content = parse_json(read_text(directory / NUMBERS, JSON_BYTES))
        listed = content.get("files") if isinstance(content, dict) else None
    except (OSError, ValueError):
        return []
    if isinstance(listed, list):
        return [name for name in listed if isinstance(name, str)]
    # Older reports don't list their files: they have these two, and pictures and numbers of known types.
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
        analysis: the analysis that :func:`~dyconvert.analysis.study.analyse` returned.
        directory: it is created if it doesn't exist. With `force`, a report in it is replaced when the new one is
            complete.
        images: the analysed images, of which the page shows those that drive an expert most. None: none are shown.

    Returns:
        The page.

    Raises:
        DyconvertError: the extra `report` isn't installed; the directory holds other files, or can't be written.
    """
    check_extra()
    directory = as_path(directory, DyconvertError)
    check_directory(directory, force)
    import matplotlib as mpl

    from dyconvert.report import page
    from dyconvert.report.numbers import tables
    from dyconvert.report.style import for_page, settings, to_png, to_svg

    with write_errors_as(directory, DyconvertError):
        directory.parent.mkdir(parents=True, exist_ok=True)
        with private_folder(directory.parent) as folder:
            complete = folder / directory.name
            for name in ("figures", "numbers"):
                (complete / name).mkdir(parents=True)
            with mpl.rc_context(cast(Any, settings())), warnings.catch_warnings():
                # No font here may have the characters of a class's name; the page's text shows them.
                warnings.filterwarnings("ignore", message="Glyph .* missing from")
                sections = page.drawings(analysis)
                drawn = [drawing for section in sections.values() for drawing in section]
                for done, drawing in enumerate(drawn):
                    if progress is not None:
                        progress("drawing", done, len(drawn))
                    # The layout is computed once, for both files.
                    drawing.figure.draw_without_rendering()
                    drawing.figure.set_layout_engine("none")
                    svg = to_svg(drawing.figure, drawing.name)
                    _write(complete / "figures" / f"{drawing.name}.svg", svg)
                    (complete / "figures" / f"{drawing.name}.png").write_bytes(to_png(drawing.figure))
                    drawing.svg = for_page(svg, drawing.label)
            html = page.render(analysis, sections, page.galleries(analysis, images))
            _write(complete / PAGE, html)
            for name, text in tables(analysis).items():
                _write(complete / "numbers" / name, text)
            files = sorted(path.relative_to(complete).as_posix() for path in complete.rglob("*") if path.is_file())
            numbers = {**json.loads(analysis.model_dump_json()), "files": [*files, NUMBERS]}
            _write(complete / NUMBERS, json.dumps(numbers) + "\n")
            replace_directory(complete, directory, written_before(directory), DyconvertError)
    return directory / PAGE


def _write(file: Path, text: str) -> None:
    # A folder's name may have bytes that aren't text.
    file.write_text(text, encoding="utf-8", errors="replace")
