"""Open archives: shared by threads, few at a time, compressed ones read sequentially."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from serving.inputs import archives, open_archives, sources
from tests.support.tar_files import KINDS, find_all, only_images, shard_members, write_tar


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The archive of each pass over headers."""
    members, paths = archives.members, []

    def counted(path: str, *args: Any) -> Any:
        paths.append(path)
        return members(path, *args)

    monkeypatch.setattr(archives, "members", counted)
    return paths


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_threads_share_one_pass_over_an_archive(
    folder: Path, passes: list[str], suffix: str
) -> None:
    members = shard_members(200)
    names = find_all(write_tar(f"a{suffix}", members.items(), KINDS[suffix]))
    readers = [sources.Reader() for _ in range(8)]
    del passes[:]
    with ThreadPoolExecutor(8) as pool:
        order = [name for start in range(8) for name in names[start * 50 : start * 50 + 50]]
        loaded = list(pool.map(lambda pair: readers[pair[0] % 8].load(pair[1]), enumerate(order)))
    assert loaded == list(only_images(members).values())
    assert passes == [f"a{suffix}"]
    for reader in readers:
        reader.close()


def test_a_compressed_archive_is_read_again_for_an_earlier_member(
    folder: Path, reader: sources.Reader, passes: list[str]
) -> None:
    names = find_all(write_tar("a.tar.gz", only_images(shard_members(10)).items(), "w:gz"))
    del passes[:]
    assert reader.load(names[9]) != reader.load(names[0])  # passed, and cached
    assert len(passes) == 1
    reader.load(names[0])
    assert len(passes) == 2


def test_without_a_cache_each_earlier_member_starts_a_new_pass(
    folder: Path, reader: sources.Reader, passes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_archives, "_CACHE_BYTES", 0)
    names = find_all(write_tar("a.tar.gz", only_images(shard_members(10)).items(), "w:gz"))
    del passes[:]
    for place, times in ((0, 1), (5, 1), (9, 1), (2, 2), (3, 2), (1, 3)):
        reader.load(names[place])
        assert len(passes) == times


def test_a_replaced_archive_is_opened_again(folder: Path, reader: sources.Reader) -> None:
    for suffix in (".tar", ".tar.gz"):
        for word in (b"old", b"a new one"):
            name = write_tar(f"b{suffix}", [("w.jpg", b"w"), ("x.jpg", word)], KINDS[suffix])
            Path(name).replace(f"a{suffix}")
            assert reader.load(f"a{suffix}::x.jpg") == word
            assert reader.load(f"a{suffix}::w.jpg") == b"w"


def test_the_cache_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_archives, "_CACHE_BYTES", 5000)
    cache = open_archives._MemberCache()
    for number in range(100):
        cache.put(("a.tar", f"{number}"), b"x" * 1000)
    cache.put(("a.tar", "99"), b"y" * 1000)
    assert [cache.pop(("a.tar", f"{n}")) is not None for n in range(100)].count(True) == 5
    assert cache._bytes == 0


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
@pytest.mark.parametrize(("bound", "most"), [("_MAX_OPEN", 4), ("_MAX_NAMES", 20)])
def test_few_archives_are_open_and_none_after_the_last_reader(
    folder: Path, monkeypatch: pytest.MonkeyPatch, bound: str, most: int
) -> None:
    def opened() -> int:
        links = (
            os.readlink(f"/proc/self/fd/{fd}")
            for fd in os.listdir("/proc/self/fd")
            if os.path.lexists(f"/proc/self/fd/{fd}")
        )
        return sum(str(folder) in link for link in links)

    monkeypatch.setattr(open_archives, bound, most)
    for number in range(20):
        write_tar(
            f"{number}.tar{'.gz' * (number % 2)}",
            shard_members(3).items(),
            "w:gz" if number % 2 else "w",
        )
    names = find_all("*.tar", "*.gz")
    first, second = sources.Reader(), sources.Reader()
    for name in names:
        assert first.load(name) == second.load(name)
        assert opened() <= 8
    assert opened() > 0
    first.close()
    assert second.load(names[0])
    second.close()
    assert opened() == 0
    assert second.load(names[0])  # a closed reader opens the archive again
    second.close()


def test_the_least_recently_used_archive_is_closed(
    folder: Path, reader: sources.Reader, passes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_archives, "_MAX_OPEN", 3)
    for name in "abcd":
        write_tar(f"{name}.tar", [("x.jpg", b"x")])
    for name in "abcad":
        reader.load(f"{name}.tar::x.jpg")
    del passes[:]
    reader.load("a.tar::x.jpg")
    assert passes == []
    reader.load("b.tar::x.jpg")
    assert passes == ["b.tar"]
