"""The demo page in a real browser, with a real service."""

import base64
import io
import json
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.support.browser import CHROMIUM, NAMES, Browser, Page
from tests.support.live_server import Live, live
from tests.support.page_fixture import (
    ANSWERED,
    LABELS,
    NAME,
    REFUSED,
    THRESHOLDS,
    check,
    opened,
    percent,
    written,
)
from tests.support.tiny_bundle import altered, photo, tiny_bundle

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=f"none of {', '.join(NAMES)} here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_bundle(tmp_path_factory.mktemp("bundle"), classes=len(LABELS))
    altered(folder, labels=LABELS, name=NAME, thresholds=THRESHOLDS)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with live(folder, tmp_path_factory.mktemp("server") / "log", FLEDGE_DEVICE="cpu") as server:
        yield server


@pytest.fixture
def page(browser: Browser, server: Live) -> Iterator[Page]:
    with opened(browser, f"{server.url}/") as page:
        page.until("!document.getElementById('views').hidden")
        yield page


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_a_photo_is_answered(page: Page, server: Live, tmp_path: Path):
    data = photo(1)
    assert page.text("#name") == NAME
    assert "7 classes" in page.text("#about")
    assert "fp32 on CPU" in page.text("#about")
    assert all(label in page.text("#labels") for label in LABELS)
    page.choose("#file", written(tmp_path / "my photo's.jpg", data))
    answer = check(page, server.url, data)
    assert (answer["confident"], answer["out_of_distribution"]) == (False, True)
    status = page.value("document.querySelector('[role=status][aria-live]').textContent")
    for item in answer["predictions"]:
        assert f"{item['label']}, {percent(item['probability'])}" in status
    facts = page.text("#facts")
    assert " ms, there and back" in facts or " s, there and back" in facts
    assert "the plain one" in facts
    page.until("!document.getElementById('stage').hidden")
    assert page.text("#caption").startswith("my photo's.jpg · ")
    assert page.text("#caption").endswith("80 \u00d7 60")
    widths = "[...document.querySelectorAll('#bars i')].map((i) => i.style.cssText)"
    assert len(set(page.value(widths))) == 5
    if shutil.which("curl"):
        line = shlex.split(page.text("#curl"))
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, check=True, timeout=60)
        assert json.loads(done.stdout) == answer


def test_a_choice_of_views_sends_the_photo_again(page: Page, server: Live, tmp_path: Path):
    data = photo(2)
    page.choose("#file", written(tmp_path / "photo.jpg", data))
    answer = check(page, server.url, data)
    assert (answer["confident"], answer["out_of_distribution"]) == (True, False)
    assert page.text("#choices").split("\n") == ["Plain", "4 views", "All 10"]
    for views in (4, 10):
        page.value("document.querySelector(':checked').focus()")
        page.press("ArrowRight")
        page.until(f"document.getElementById('facts').innerText.includes('{views}, averaged')")
        check(page, server.url, data, f"?tta={views}")
        assert f"/predict?tta={views}'" in page.text("#curl")


def test_conversions_of_a_photo_are_shown(page: Page, tmp_path: Path):
    image = Image.open(io.BytesIO(photo(3)))
    exif = image.getexif()
    exif[0x0112] = 6
    cases = {
        "turned.jpg": (saved(image, "JPEG", exif=exif), "Turned upright"),
        "print.tif": (saved(image.convert("CMYK"), "TIFF"), "Its CMYK colours converted to RGB"),
        "clear.png": (saved(image.convert("RGBA"), "PNG"), "transparent parts"),
    }
    for name, (data, words) in cases.items():
        page.choose("#file", written(tmp_path / name, data))
        page.until(f"document.getElementById('applied').innerText.includes({words!r})")
        if name == "print.tif":
            page.until("!document.getElementById('no-preview').hidden")
            assert page.value("document.getElementById('stage').hidden")
    page.choose("#file", written(tmp_path / "plain.jpg", photo(3)))
    page.until("document.getElementById('conversions').hidden")


def test_a_bad_file_shows_an_error(page: Page, tmp_path: Path):
    cases = {
        "note.txt": (b"not a picture", "This is not an image"),
        "half.jpg": (photo(1)[:-400], "This image is damaged"),
        "empty.png": (b"", "This file is empty"),
        "old.psd": (b"8BPS" + bytes(99), "This kind of image is not read here"),
    }
    for name, (data, words) in cases.items():
        page.choose("#file", written(tmp_path / name, data))
        page.until(f"{REFUSED} && document.getElementById('error-title').innerText === {words!r}")
        assert len(page.text("#detail")) > 20
        assert page.text("#request").startswith("Request ")
        assert page.value("document.getElementById('retry').hidden")
    page.choose("#file", written(tmp_path / "good.jpg", photo(1)))
    page.until(ANSWERED)
    assert page.value("document.getElementById('error').hidden")


def test_photos_can_be_dropped_and_pasted(page: Page, server: Live):
    carry = """(seed) => {
      const bytes = Uint8Array.from(atob(seed), (c) => c.charCodeAt(0));
      const carried = new DataTransfer();
      carried.items.add(new File([bytes], 'carried.jpg', {type: 'image/jpeg'}));
      return carried;
    }"""
    events = {
        4: "new DragEvent('drop', {dataTransfer: carried, bubbles: true, cancelable: true})",
        5: "new ClipboardEvent('paste', {clipboardData: carried, bubbles: true})",
    }
    for seed, event in events.items():
        data = photo(seed)
        page.value("document.getElementById('answer').hidden = true")
        encoded = base64.b64encode(data).decode()
        page.value(
            f"{{const carried = ({carry})('{encoded}'); document.body.dispatchEvent({event})}}"
        )
        check(page, server.url, data)
    page.value(
        "{const dataTransfer = new DataTransfer(); dataTransfer.setData('text/uri-list', 'x:y');"
        "document.body.dispatchEvent(new DragEvent('drop', {dataTransfer, bubbles: true}))}"
    )
    assert page.text("#error-title") == "That was a link, not a file"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_small_screen(browser: Browser, server: Live, tmp_path: Path, scheme: str):
    with opened(browser, f"{server.url}/", width=320, prefers_color_scheme=scheme) as page:
        page.choose("#camera", written(tmp_path / f"{'long' * 30}.jpg", photo(6)))
        page.until(ANSWERED)
        assert page.value("document.documentElement.scrollWidth") == 320
        assert page.text("label[for=camera]") == "Take a photo"
        ground = page.value("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(20, 23, 26)") == (scheme == "dark")


def test_the_keyboard_reaches_every_control_with_a_visible_focus(page: Page):
    where = """(() => {
      const active = document.activeElement, visible = active.matches('.hidden') ?
        active.nextElementSibling : active;
      return [active.id || active.textContent, getComputedStyle(visible).outlineStyle];
    })()"""
    reached = {}
    for _ in range(6):
        page.press("Tab")
        name, outline = page.value(where)
        reached[name] = outline
    assert list(reached) == ["API", "Model", "Metrics", "file", "tta-0", "copy"]
    assert set(reached.values()) == {"solid"}
