"""Draw the pictures of the README: docs/report.webp and docs/demo-page.webp.

    python -m docs.pictures RUN BUNDLE

RUN is a finished run, whose report is drawn. BUNDLE is served, and its demo page classifies a photo
of the built-in data set. Needs Chromium.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

from deploy.demo import free_port, running, sample_photo, wait_until_ready
from tests.support.browser import CHROMIUM, Page, chromium

DOCS = Path(__file__).parent
MEDIA = {"prefers_color_scheme": "light", "prefers_reduced_motion": "reduce"}
WIDTH, HEIGHT = 900, 760
"""Pixels of a page, and how much of it the picture shows."""


def main() -> None:
    """Draw both pictures."""
    parser = argparse.ArgumentParser(description="Draw the pictures of the README.")
    parser.add_argument("run", type=Path, help="a finished run")
    parser.add_argument("bundle", type=Path, help="a bundle of it")
    options = parser.parse_args()
    if CHROMIUM is None:
        sys.exit("Chromium is not installed")
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    fledge = str(Path(sys.executable).with_name("fledge"))
    with (
        tempfile.TemporaryDirectory() as folder,
        chromium(Path(folder)) as browser,
        running([fledge, "serve", str(options.bundle), "--port", str(port)]) as service,
    ):
        report = (options.run / "report.html").resolve().as_uri()
        with browser.page(report, WIDTH, **MEDIA) as page:
            save(page, DOCS / "report.webp")
        wait_until_ready(service, address)
        with browser.page(address, WIDTH, **MEDIA) as page:
            page.until("!document.getElementById('views').hidden")
            page.choose("#file", sample_photo())
            page.until("document.querySelector('#facts').innerText")
            save(page, DOCS / "demo-page.webp")


def save(page: Page, path: Path) -> None:
    """Write the upper part of a page as WebP."""
    with tempfile.TemporaryDirectory() as folder:
        page.screenshot(Path(folder) / "page.png")
        data = (Path(folder) / "page.png").read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        image.crop((0, 0, image.width, min(image.height, HEIGHT))).save(path, quality=82, method=6)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
