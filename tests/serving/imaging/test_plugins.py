"""HEIC and JPEG XL: what is told without their packages, and where they are decoded with them."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import httpx
import pytest

from serving.errors import BrokenImage, TooLarge, UnsupportedFormat
from serving.imaging import cost, decode, formats
from serving.imaging.heads import plugins as plugin_heads
from serving.imaging.isolated import DecoderPool
from tests.robustness import plugin_formats
from tests.robustness.plugin_formats import Bits, head, heic, jpeg_xl
from tests.robustness.scene import scene
from tests.support.live_server import live
from tests.support.tiny_bundle import photo, tiny_bundle

ROOT = Path(__file__).parents[3]
FILES = {"HEIC": heic(scene()), "JPEG XL": jpeg_xl(scene())}
BY_NAME = {one.name: one for one in formats.OPTIONAL}


def without(monkeypatch: pytest.MonkeyPatch, name: str) -> formats.OptionalFormat:
    monkeypatch.setitem(sys.modules, BY_NAME[name].package, None)
    return BY_NAME[name]


@pytest.mark.parametrize("name", FILES)
def test_without_its_package_the_error_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    missing = without(monkeypatch, name)
    with pytest.raises(UnsupportedFormat) as caught:
        decode.decode(FILES[name])
    assert str(caught.value).startswith(
        f"{name} needs {missing.distribution}: pip install {missing.distribution} "
        f"(container: make image EXTRAS={missing.extra}); or use JPEG, "
    )
    assert name not in str(caught.value).partition("or use")[2]
    # It is known before a process is started or memory is reserved.
    with pytest.raises(UnsupportedFormat):
        decode.check(FILES[name], 10**8)


def test_the_extras_named_in_errors_install_the_packages() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for one in formats.OPTIONAL:
        assert [line.partition(">=")[0] for line in extras[one.extra]] == [one.distribution]
        assert any(line.startswith(one.distribution) for line in extras["dev"])
        lock = (ROOT / f"requirements/{one.extra}.txt").read_text()
        pinned = lock.partition(" ")[0]
        assert pinned.startswith(f"{one.distribution}==")
        assert f"\n{pinned} " in (ROOT / "requirements/dev.txt").read_text()


def test_suffixes_of_missing_packages_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert formats.missing_format("a/1.HEIC") is None
    missing = without(monkeypatch, "HEIC")
    assert formats.missing_format("a/1.HEIC") == missing
    assert formats.missing_format("a/1.jxl") is None
    assert {".heic", ".heif", ".hif", ".jxl"} <= formats.SUFFIXES


@pytest.mark.parametrize("name", FILES)
def test_they_are_decoded_in_a_process_of_their_own(name: str) -> None:
    code = """
import sys
from pathlib import Path
from serving.imaging.decode import decode
assert decode(Path(sys.argv[1]).read_bytes()).image.size == (64, 32)
print([name for name in ("pillow_heif", "pillow_jxl") if name in sys.modules])
"""
    path = Path(os.devnull).parent / "stdin"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        cwd=ROOT,
        input=FILES[name],
        capture_output=True,
        check=False,
    )
    assert done.stdout == b"[]\n", done.stderr
    assert cost.estimate(FILES[name]).isolated


@pytest.mark.process
@pytest.mark.parametrize("name", FILES)
def test_the_memory_limit_of_the_process_holds(name: str) -> None:
    size = (2400, 1600)
    large = scene().resize(size)
    data = heic(large) if name == "HEIC" else jpeg_xl(large, effort=1)
    pool = DecoderPool(1)
    request = {"max_pixels": 10**8, "preprocess": {}, "too_large": "too large"}
    estimated = cost.estimate(data)
    assert (estimated.width, estimated.height) == size
    # The first image of a process, and one after others.
    for _ in range(2):
        assert pool.decode(data, request, memory=estimated.bytes)[0].shape == (1600, 2400, 3)
    pool.close()
    with pytest.raises((TooLarge, BrokenImage)):
        DecoderPool(1).decode(data, request, memory=-(2**24))


@pytest.mark.parametrize("size", [(64, 32), (65, 32), (8, 8), (256, 256), (300, 200), (1601, 901)])
def test_the_head_of_a_jpeg_xl_states_its_size(size: tuple[int, int]) -> None:
    for options in ({}, {"use_container": True}, {"lossless": False}):
        found = plugin_heads.jpeg_xl(jpeg_xl(scene().resize(size), effort=1, **options))
        assert found is not None
        assert (found.width, found.height, found.animated) == (*size, False)


def test_sizes_by_ratio_and_of_any_number_of_bits() -> None:
    for ratio, width in enumerate((600, 720, 800, 900, 1066, 750, 1200), 1):
        bits = Bits().put((0, 1), (1, 2), (599, 13), (ratio, 3), (1, 1)).bytes()
        found = plugin_heads.jpeg_xl(b"\xff\x0a" + bits)
        assert found is not None
        assert (found.width, found.height) == (width, 600)
    found = plugin_heads.jpeg_xl(head(2**30, 7, (1, 1)))
    assert found is not None
    assert (found.width, found.height) == (2**30, 7)
    for data in (b"", b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n", FILES["JPEG XL"][:1]):
        assert plugin_heads.jpeg_xl(data) is None or data == b"\xff\x0a"


def test_depth_and_orientation_of_a_jpeg_xl_are_read() -> None:
    deep = head(64, 32, (0, 1), (0, 1), (0, 1), (3, 2), (15, 6))
    turned = head(64, 32, (0, 1), (1, 1), (5, 3), (0, 3), (0, 1), (0, 2))
    assert plugin_heads.jpeg_xl(deep) == plugin_heads.PluginHead(64, 32, 16)
    assert plugin_heads.jpeg_xl(turned) == plugin_heads.PluginHead(64, 32, 8, True)


def test_an_avif_is_read_as_before_although_it_may_begin_as_a_heic() -> None:
    items = {item.name: item.data for item in plugin_formats.heics()}
    assert formats.optional_format(items["heic"]) == BY_NAME["HEIC"]
    avif = b"\0\0\0\x1cftypmif1\0\0\0\0mif1avif"
    assert formats.optional_format(avif) is None
    assert formats.served(avif) == "AVIF"


@pytest.mark.process
@pytest.mark.parametrize("name", FILES)
def test_the_service_answers_415_with_the_remedy_without_the_package(
    tmp_path: Path, name: str
) -> None:
    missing = BY_NAME[name]
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(
        f"import sys\nsys.modules[{missing.package!r}] = None\n"
    )
    path = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    bundle = tiny_bundle(tmp_path / "bundle")
    log, env = tmp_path / "log", {"FLEDGE_DEVICE": "cpu", "PYTHONPATH": path}
    with live(bundle, log, new_interpreter=True, **env) as server:
        answer = httpx.post(f"{server.url}/predict", content=FILES[name], trust_env=False)
        good = httpx.post(f"{server.url}/predict", content=photo(1), trust_env=False)
    assert (answer.status_code, answer.json()["code"]) == (415, "unsupported-format")
    assert answer.json()["detail"].startswith(
        f"{name} needs {missing.distribution}: pip install {missing.distribution}"
    )
    assert good.status_code == 200
