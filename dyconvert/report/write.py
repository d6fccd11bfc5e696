"""write_report: a directory with the page, its pictures and its numbers, all of it or nothing."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from dyconvert.analysis.images import ImageSet
from dyconvert.analysis.study import Analysis
from dyconvert.errors import DyconvertError
from dyconvert.installation import install_command

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
    above = next((parent for parent in directory.parents if parent.exists()), None)
    if (directory.exists() and not directory.is_dir()) or (above is not None and not above.is_dir()):
        raise DyconvertError(
            f"{directory} can't be made: it, or what it stands in, is a file. Choose another: `directory=...`."
        )
    if not directory.exists() or not any(directory.iterdir()):
        return
    if not (directory / PAGE).exists():
        raise DyconvertError(f"{directory} holds other files. Choose another: `directory=...`.")
    if not force:
        raise DyconvertError(
            f"{directory} holds a report already. Replace it with `force=True`, or choose another: `directory=...`."
        )


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
    directory = Path(directory)
    check_directory(directory, force)
    import matplotlib as mpl

    from dyconvert.report import page
    from dyconvert.report.numbers import tables
    from dyconvert.report.style import for_page, settings, to_png, to_svg

    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as temporary:
            made = Path(temporary) / directory.name
            for folder in ("figures", "numbers"):
                (made / folder).mkdir(parents=True)
            with mpl.rc_context(settings()):
                sections = page.drawings(analysis)
                drawn = [drawing for section in sections.values() for drawing in section]
                for done, drawing in enumerate(drawn):
                    if progress is not None:
                        progress("drawing", done, len(drawn))
                    # Laid out once, for both files.
                    drawing.figure.draw_without_rendering()
                    drawing.figure.set_layout_engine("none")
                    svg = to_svg(drawing.figure, drawing.name)
                    (made / "figures" / f"{drawing.name}.svg").write_text(svg, encoding="utf-8")
                    (made / "figures" / f"{drawing.name}.png").write_bytes(to_png(drawing.figure))
                    drawing.svg = for_page(svg, drawing.label)
            html = page.render(analysis, sections, page.galleries(analysis, images))
            (made / PAGE).write_text(html, encoding="utf-8")
            (made / NUMBERS).write_text(analysis.model_dump_json() + "\n", encoding="utf-8")
            for name, text in tables(analysis).items():
                (made / "numbers" / name).write_text(text, encoding="utf-8")
            os.chmod(made, 0o755)
            if directory.exists():
                # A rename can't replace a directory that isn't empty.
                old = Path(temporary) / "old"
                os.replace(directory, old)
                os.replace(made, directory)
                shutil.rmtree(old)
            else:
                os.replace(made, directory)
    except OSError as error:
        raise DyconvertError(f"{directory} can't be written: {error}. Choose another: `directory=...`.") from error
    return directory / PAGE
