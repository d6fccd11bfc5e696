"""How this copy of dyconvert was installed, and so what installs more of it."""

import importlib.metadata
import json
import re
import shlex
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]


def install_command(*extras: str) -> str:
    """The command that adds the extras to this copy: `pip install '.[train]'` in a clone.

    A copy from a package index or from a repository is named as it was named then. A copy from a folder or a file that
    is gone can't be installed again; then the command names the extras' own packages, which works everywhere.
    """
    named = f"[{','.join(extras)}]" if extras else ""
    if (_ROOT / "pyproject.toml").is_file() and (_ROOT / "dyconvert" / "version.py").is_file():
        return _install(_folder(_ROOT) + named)
    origin = _origin()
    if origin is None:
        return _install("dyconvert" + named)
    url, vcs = str(origin.get("url", "")), origin.get("vcs_info")
    if isinstance(vcs, dict):
        revision = f"@{vcs['requested_revision']}" if vcs.get("requested_revision") else ""
        return _install(f"dyconvert{named} @ {vcs.get('vcs')}+{url}{revision}")
    if not url.startswith("file:"):
        return _install(f"dyconvert{named} @ {url}")
    path = Path(urllib.request.url2pathname(urllib.parse.urlsplit(url).path))
    return _install(_folder(path) + named) if path.exists() else _install(*_packages(extras))


def upgrade_command() -> str:
    """The command that brings a newer version of this copy."""
    if (_ROOT / ".git").exists():
        root = shlex.quote(_folder(_ROOT))
        return f"git -C {root} pull && pip install -U {root}"
    return install_command().replace("pip install", "pip install -U")


def _install(*requirements: str) -> str:
    return f"pip install {shlex.join(requirements)}"


def _folder(path: Path) -> str:
    """The path as it is typed here: `.` in the folder itself."""
    return "." if path == Path.cwd() else str(path)


def _origin() -> dict[str, Any] | None:
    """Pip's record of this copy's origin (PEP 610); None if it came from an index."""
    try:
        text = importlib.metadata.distribution("dyconvert").read_text("direct_url.json")
        origin = json.loads(text) if text else None
    except (importlib.metadata.PackageNotFoundError, ValueError, OSError):
        return None
    return origin if isinstance(origin, dict) else None


def _packages(extras: tuple[str, ...]) -> list[str]:
    """The requirements of the extras, as the installed copy's metadata has them."""
    packages = []
    for requirement in importlib.metadata.requires("dyconvert") or ():
        package, _, marker = requirement.partition(";")
        match = re.search(r"""extra\s*==\s*["']([^"']+)["']""", marker)
        if match and match[1] in extras:
            packages.append(package.strip())
    return packages
