"""Links of the pages that lead out of `docs`, to the code beside it, lead to the repository on the site.

The pages are read in a clone as well, where such links are relative. One that leads nowhere fails the build.
"""

import logging
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\]\((\.\./[^)#\s]+)(#[^)\s]*)?\)")
# Docstrings name others as Sphinx has it.
ROLE = re.compile(r":(?:class|data|func|meth|mod):<code>~?(?:[\w.]+\.)?(\w+)</code>|:math:(?=<code>)")
FOLDER = re.compile(r"\]\((results)\)")
_log = logging.getLogger("mkdocs.hooks.links")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    folder = Path(config["docs_dir"]) / Path(page.file.src_uri).parent

    def absolute(found: re.Match[str]) -> str:
        target = (folder / found[1]).resolve()
        if not target.exists():
            _log.warning("%s links to %s, which isn't there", page.file.src_uri, found[1])
        place = target.relative_to(ROOT).as_posix() if target.is_relative_to(ROOT) else ""
        kind = "tree" if target.is_dir() else "blob"
        return f"]({config['extra']['repository']}/{kind}/main/{place}{found[2] or ''})"

    markdown = LINK.sub(absolute, markdown)
    return FOLDER.sub(f"]({config['extra']['repository']}/tree/main/docs/\\1)", markdown)


def on_page_content(html: str, **_: Any) -> str:
    return ROLE.sub(lambda found: f"<code>{found[1]}</code>" if found[1] else "", html)
