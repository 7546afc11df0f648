"""The demo page in a real browser draws what the model looks at, for each `Preprocess.fit`."""

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from serving.http.model_manager import ModelManager
from serving.settings import Settings
from tests.support.browser import CHROMIUM, NAMES, Browser, Page
from tests.support.page_fixture import ANSWERED, NoTelemetry, opened, served, written
from tests.support.tiny_bundle import photo, tiny_bundle

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=f"none of {', '.join(NAMES)} here")

BACKGROUND = (10, 200, 90)
# The drawn boxes in CSS pixels: of the photo's element, and of the frame without its outline.
BOXES = """(() => {
  const box = (id) => {
    const {left, top, width, height} = document.getElementById(id).getBoundingClientRect();
    return {left, top, width, height};
  };
  return {stage: box('stage'), frame: box('frame'), square: box('square')};
})()"""


def turned(size: tuple[int, int]) -> bytes:
    """A JPEG of `size` (width, height) whose EXIF says that it must be turned by 90 degrees."""
    with Image.open(io.BytesIO(photo(3, size))) as image:
        exif = image.getexif()
        exif[0x0112] = 6
        file = io.BytesIO()
        image.save(file, "JPEG", exif=exif)
    return file.getvalue()


def boxes(page: Page, path: Path) -> Any:
    page.choose("#file", path)
    page.until(
        f"document.getElementById('caption').innerText.match(/^{path.name}.*\\u00d7/) "
        f"&& !document.getElementById('fit').hidden && {ANSWERED}"
    )
    return page.value(BOXES)


def ratio(box: dict[str, float]) -> float:
    return box["width"] / box["height"]


def test_a_square_photo_that_is_seen_whole_has_no_frame(browser: Browser, tmp_path: Path):
    folder = tiny_bundle(tmp_path / "bundle", crop=1.0)
    model_manager = ModelManager(Settings(bundle=folder, device="cpu"), NoTelemetry())
    model_manager.load()
    with served(model_manager) as (url, _), opened(browser, url) as page:
        drawn = boxes(page, written(tmp_path / "square.jpg", photo(1, (90, 90))))
        assert drawn["frame"]["width"] == drawn["square"]["width"] == 0
        assert page.text("#seen") == "The model looks at the whole photo."
        drawn = boxes(page, written(tmp_path / "wide.jpg", photo(1, (120, 90))))
        assert ratio(drawn["frame"]) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("fit", ["crop", "squish", "pad"])
def test_what_the_model_looks_at_is_drawn(browser: Browser, tmp_path: Path, fit: str):
    folder = tiny_bundle(tmp_path / "bundle", fit=fit, decode="scaled", background=BACKGROUND)
    model_manager = ModelManager(Settings(bundle=folder, device="cpu"), NoTelemetry())
    model_manager.load()
    photos = {
        "landscape": (photo(1, (400, 300)), 4 / 3),
        "portrait": (photo(2, (300, 400)), 3 / 4),
        "panorama": (photo(3, (900, 300)), 3.0),
        "turned": (turned((400, 300)), 3 / 4),  # upright it is 300 x 400
        "square": (photo(4, (200, 200)), 1.0),
    }
    with served(model_manager) as (url, _), opened(browser, url, width=360) as page:
        for name, (data, upright) in photos.items():
            drawn = boxes(page, written(tmp_path / f"{name}.jpg", data))
            stage, frame = drawn["stage"], drawn["frame"]
            assert ratio(stage) == pytest.approx(1 if fit == "pad" else upright, rel=0.02)
            if fit == "crop":
                side = 0.875 * min(stage["width"], stage["height"])
                assert frame["width"] == pytest.approx(side, abs=1)
                assert frame["height"] == pytest.approx(side, abs=1)
                for start, side in (("left", "width"), ("top", "height")):  # it is centred
                    centres = [box[start] + box[side] / 2 for box in (stage, frame)]
                    assert centres[0] == pytest.approx(centres[1], abs=1)
            else:
                assert frame["width"] == 0
            squished = fit == "squish" and upright != 1
            assert (drawn["square"]["width"] > 0) == squished
            if squished:
                assert ratio(drawn["square"]) == 1
            words = {"crop": "framed square", "squish": "squeezed into", "pad": "plain colour"}
            whole = fit != "crop" and upright == 1
            assert ("the whole photo." if whole else words[fit]) in page.text("#seen")
            assert page.value("document.documentElement.scrollWidth") == 360
        ground = page.value("getComputedStyle(document.getElementById('stage')).backgroundColor")
        assert ground == f"rgb{BACKGROUND}"
        page.choose("#file", written(tmp_path / "note.txt", b"no picture"))
        page.until("!document.getElementById('no-preview').hidden")
        assert page.value("document.getElementById('fit').hidden")
        assert page.value("document.getElementById('stage').hidden")
