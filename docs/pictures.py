"""Draw the pictures of the docs: report.webp, demo-page.webp and fits.webp.

    python -m docs.pictures RUN BUNDLE
    python -m docs.pictures

RUN is a finished run, whose report is drawn. BUNDLE is served, and its demo page classifies a photo
of the built-in data set. Both need Chromium. Without them only fits.webp is drawn.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw

from deploy.demo import free_port, running, sample_photo, wait_until_ready
from serving.imaging.preprocess import FITS, Preprocess
from tests.support.browser import CHROMIUM, Page, chromium

DOCS = Path(__file__).parent
MEDIA = {"prefers_color_scheme": "light", "prefers_reduced_motion": "reduce"}
WIDTH, HEIGHT = 900, 760
"""Pixels of a page, and how much of it the picture shows."""
TILE, GAP = 200, 12
"""Pixels of a square of fits.webp, and between two."""


def main() -> None:
    """Draw the pictures."""
    parser = argparse.ArgumentParser(description="Draw the pictures of the docs.")
    parser.add_argument("run", type=Path, nargs="?", help="a finished run")
    parser.add_argument("bundle", type=Path, nargs="?", help="a bundle of it")
    options = parser.parse_args()
    draw_fits(DOCS / "fits.webp")
    if options.bundle is None:
        return
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


def draw_fits(path: Path) -> None:
    """Draw a photo of 3:1 with its centre square, and what the network sees of it by each fit."""
    photos = sorted(sample_photo().parent.glob("*.jpg"))[:3]
    photo = Image.new("RGB", (3 * TILE, TILE))
    for number, one in enumerate(photos):
        with Image.open(one) as image:
            photo.paste(image.resize((TILE, TILE)), (number * TILE, 0))
    fits = [Preprocess(TILE, fit=fit) for fit in FITS]
    drawn = Image.new("RGBA", (6 * TILE + 3 * GAP, TILE))
    for number, preprocess in enumerate(fits):
        tile = Image.fromarray(preprocess(photo))
        if preprocess.fit == "pad":  # whose white would not be seen on a white page
            ImageDraw.Draw(tile).rectangle((0, 0, TILE - 1, TILE - 1), outline="grey")
        drawn.paste(tile, ((3 + number) * TILE + (number + 1) * GAP, 0))
    box = fits[0].box((0, 0, *photo.size))
    ImageDraw.Draw(photo).rectangle(box, outline="white", width=3)
    drawn.paste(photo, (0, 0))
    drawn.save(path, quality=85, method=6)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


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
