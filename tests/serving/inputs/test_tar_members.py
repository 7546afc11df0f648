"""Laws of archives that are open: shared among threads, few at a time, and read on."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from serving.inputs import sources, tar_members
from serving.inputs import tar as archives
from tests.support.tar_files import KINDS, found, images, shard, tar


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def reader() -> Iterator[sources.Reader]:
    reader = sources.Reader()
    yield reader
    reader.close()


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The archives whose headers were gone through, each time."""
    members, paths = archives.members, []

    def counted(path: str) -> Any:
        paths.append(path)
        return members(path)

    monkeypatch.setattr(archives, "members", counted)
    return paths


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_threads_go_through_an_archive_once(home: Path, passes: list[str], suffix: str) -> None:
    members = shard(200)
    names = found(tar(f"a{suffix}", members.items(), KINDS[suffix]))
    readers = [sources.Reader() for _ in range(8)]
    del passes[:]
    with ThreadPoolExecutor(8) as pool:
        order = [name for start in range(8) for name in names[start * 50 : start * 50 + 50]]
        loaded = list(pool.map(lambda pair: readers[pair[0] % 8].load(pair[1]), enumerate(order)))
    assert loaded == list(images(members).values())
    assert passes == [f"a{suffix}"]
    for reader in readers:
        reader.close()


def test_a_compressed_archive_is_begun_anew_when_asked_backwards(
    home: Path, reader: sources.Reader, passes: list[str]
) -> None:
    names = found(tar("a.tar.gz", images(shard(10)).items(), "w:gz"))
    del passes[:]
    assert reader.load(names[9]) != reader.load(names[0])  # passed, and kept
    assert len(passes) == 1
    reader.load(names[0])
    assert len(passes) == 2


def test_without_what_is_kept_each_step_back_begins_anew(
    home: Path, reader: sources.Reader, passes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tar_members, "_KEPT", 0)
    names = found(tar("a.tar.gz", images(shard(10)).items(), "w:gz"))
    del passes[:]
    for place, times in ((0, 1), (5, 1), (9, 1), (2, 2), (3, 2), (1, 3)):
        reader.load(names[place])
        assert len(passes) == times


def test_an_archive_that_was_replaced_is_opened_anew(home: Path, reader: sources.Reader) -> None:
    for suffix in (".tar", ".tar.gz"):
        for word in (b"old", b"a new one"):
            name = tar(f"b{suffix}", [("w.jpg", b"w"), ("x.jpg", word)], KINDS[suffix])
            Path(name).replace(f"a{suffix}")
            assert reader.load(f"a{suffix}::x.jpg") == word
            assert reader.load(f"a{suffix}::w.jpg") == b"w"


def test_what_is_kept_is_bounded(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_members, "_KEPT", 5000)
    kept = tar_members._Kept()
    for number in range(100):
        kept.put(("a.tar", f"{number}"), b"x" * 1000)
    kept.put(("a.tar", "99"), b"y" * 1000)
    assert [kept.take(("a.tar", f"{n}")) is not None for n in range(100)].count(True) == 5
    assert kept._bytes == 0


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
@pytest.mark.parametrize(("bound", "most"), [("_OPEN", 4), ("_NAMES", 20)])
def test_few_archives_stay_open_and_none_after_the_end(
    home: Path, monkeypatch: pytest.MonkeyPatch, bound: str, most: int
) -> None:
    def opened() -> int:
        links = (
            os.readlink(f"/proc/self/fd/{fd}")
            for fd in os.listdir("/proc/self/fd")
            if os.path.lexists(f"/proc/self/fd/{fd}")
        )
        return sum(str(home) in link for link in links)

    monkeypatch.setattr(tar_members, bound, most)
    for number in range(20):
        tar(f"{number}.tar{'.gz' * (number % 2)}", shard(3).items(), "w:gz" if number % 2 else "w")
    names = found("*.tar", "*.gz")
    first, second = sources.Reader(), sources.Reader()
    for name in names:
        assert first.load(name) == second.load(name)
        assert opened() <= 8
    assert opened() > 0
    first.close()
    assert second.load(names[0])
    second.close()
    assert opened() == 0
    assert second.load(names[0])  # a Reader opens again what it needs
    second.close()


def test_the_archive_that_was_not_asked_for_longest_is_closed(
    home: Path, reader: sources.Reader, passes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tar_members, "_OPEN", 3)
    for name in "abcd":
        tar(f"{name}.tar", [("x.jpg", b"x")])
    for name in "abcad":
        reader.load(f"{name}.tar::x.jpg")
    del passes[:]
    reader.load("a.tar::x.jpg")
    assert passes == []
    reader.load("b.tar::x.jpg")
    assert passes == ["b.tar"]
