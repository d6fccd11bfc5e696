"""Makes docs/report.png of a report: its head and three of its pictures, none with an image of the data set.

`python tests/make_report_picture.py report/report.html`; Chromium is found as in test_report.py.
"""

import sys
from pathlib import Path

from playwright.sync_api import sync_playwright
from test_report import chromium

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "report.png"
HIDE = ".gallery, details, #usage, #section-coefficients ~ section, footer { display: none !important }"


def main(page_file: Path) -> None:
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1180, "height": 800}, device_scale_factor=1.5, color_scheme="light")
        page.goto(page_file.resolve().as_uri())
        page.add_style_tag(content=HIDE + " main { padding-bottom: 1.2rem !important }")
        page.screenshot(path=PICTURE, full_page=True)
        browser.close()
    # 256 colours are enough for it, and a quarter of the bytes.
    from PIL import Image

    Image.open(PICTURE).convert("RGB").quantize(256).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
