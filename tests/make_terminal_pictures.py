"""The terminal's pictures in docs/tutorial.md: `python tests/make_terminal_pictures.py FOLDER`.

FOLDER holds the files that `.ci/tutorial.py docs/tutorial.md FOLDER` left.
"""

import io
import re
import subprocess
import sys
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

PICTURES = Path(__file__).parent.parent / "docs" / "pictures"
COMMANDS = {
    "convert": "dyconvert my_net.py:Net --weights my_net.pth --input-size 1,8,8 --g 4 -o my-net-dynamic --force",
    "finetune": "dyconvert finetune mine.yaml --trust-code output.directory=runs/again",
}
# Rich's own template loads its font from the network.
TEMPLATE = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)


def main(folder: Path) -> None:
    PICTURES.mkdir(exist_ok=True)
    for name, command in COMMANDS.items():
        run = subprocess.run(command.split(), cwd=folder, capture_output=True, text=True, check=True)
        console = Console(record=True, width=80, file=io.StringIO())
        shown = command.removesuffix(" --force").removesuffix(" output.directory=runs/again")
        # What goes to stderr comes first, as progress; the folder's own path is nobody's business.
        console.print(
            Text(
                f"$ {shown}\n{run.stderr}{run.stdout}".replace(f"{folder.resolve()}/", "").replace(
                    "runs/again", "runs/mine"
                )
            )
        )
        svg = console.export_svg(title="dyconvert", code_format=TEMPLATE, unique_id=name)
        (PICTURES / f"{name}.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
