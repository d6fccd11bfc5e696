"""Runs a page of the documentation, word for word: `python .ci/tutorial.py docs/tutorial.md [FOLDER]`.

Blocks of Python and YAML whose first line is a comment with a file's name are written to that file. Blocks of shell
run as they are printed, in the folder, one command after the other. Those that clone and install are left out with
`--installed`.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAME = re.compile(r"# (\S+\.(?:py|yaml))\n")
INSTALLS = re.compile(r"git clone|pip install|venv|^mkdir mine")


def run(page: Path, folder: Path, installed: bool) -> int:
    """Returns how many commands ran.

    Raises:
        SystemExit: one failed.
    """
    count = 0
    for kind, text in BLOCK.findall(page.read_text(encoding="utf-8")):
        if kind == "sh":
            for command in text.strip().splitlines():
                if installed and INSTALLS.search(command):
                    continue
                print(f"$ {command}", flush=True)
                count += 1
                if code := subprocess.run(["bash", "-c", command], cwd=folder, env=os.environ).returncode:
                    raise SystemExit(f"{page}: `{command}` ended with {code}.")
        elif name := NAME.match(text):
            (folder / name[1]).write_text(text, encoding="utf-8")
    return count


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("page", type=Path)
    options.add_argument("folder", type=Path, nargs="?")
    options.add_argument("--installed", action="store_true")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        count = run(given.page, given.folder or Path(temporary), given.installed)
    print(f"{given.page}: {count} commands ran as printed", file=sys.stderr)


if __name__ == "__main__":
    main()
