import json
import os
import threading
import time

import pytest

import fledge
from serving.errors import OptionError
from training.utils import disk_cache

KEY = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder that FLEDGE_CACHE names, with somebody's things in it."""
    folder = tmp_path / "home"
    (folder / "letters").mkdir(parents=True)
    (folder / "letters" / "index").write_text("mine")
    (folder / "index").write_text("mine")
    (folder / f"pixels-{KEY[::-1]}").mkdir()  # the name alone does not make it ours
    (folder / f"pixels-{KEY[::-1]}" / "index").write_text("mine")
    monkeypatch.setenv("FLEDGE_CACHE", str(folder))
    return folder


def no_wait():
    raise AssertionError("nobody else holds it")


def entry(room, key, size, used, kind="pixels"):
    path = room.folder / f"{kind}-{key * 32}"
    with disk_cache.held(path, f"entry {key}", no_wait):
        (path / "index").write_bytes(b"")
        (path / f"rows-{key * 16}.bin").write_bytes(bytes(size))
    os.utime(path / disk_cache.MARK, (used, used))
    return path


def everything(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_clear_removes_entries_and_nothing_else(home, capsys):
    before = everything(home)
    room = disk_cache.open_cache()
    entry(room, "a", 1000, 1)
    entry(room, "b", 2000, 2, "activations")
    target = home / "letters"
    (home / f"pixels-{'c' * 32}").symlink_to(target, target_is_directory=True)
    shared = entry(room, "d", 500, 3)
    (shared / "notes.txt").write_text("mine")
    assert fledge.main(["cache"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert str(home) in out[0]
    assert [line.rpartition("  ")[2] for line in out[1:]] == ["entry d", "entry b", "entry a"]
    assert fledge.main(["cache", "--clear"]) == 0
    assert capsys.readouterr().out.startswith("0.0 MB freed")
    assert everything(home) == before | {shared / "notes.txt": b"mine"}
    assert disk_cache.open_cache().entries() == []
    assert (home / f"pixels-{'c' * 32}").is_symlink()


def test_the_least_recently_used_go_first_and_what_is_written_stays(home):
    room = disk_cache.DiskCache(home, 3500)
    a, b, c = (entry(room, key, 1000, used) for key, used in (("a", 30), ("b", 10), ("c", 20)))
    assert [item.path for item in room.entries()] == [b, c, a]
    assert room.make_room(500, set())
    assert room.size() == 3000
    assert room.make_room(1000, {b.name})
    assert (a.exists(), b.exists(), c.exists()) == (True, True, False)
    disk_cache.touch(b)
    with disk_cache.held(a, "entry a", no_wait):
        assert not room.make_room(3000, {b.name})
        assert a.exists()
        assert room.clear()[1][0].path == a
    assert not b.exists()
    assert room.make_room(3000, set())
    assert not a.exists()
    assert not room.make_room(3501, set())


def test_a_second_holder_waits_and_finds_the_entry_even_if_it_was_removed(home):
    path = home / f"pixels-{KEY}"
    order, waiting = [], threading.Event()

    def second():
        with disk_cache.held(path, "second", waiting.set):
            order.append("second")
            assert json.loads((path / disk_cache.MARK).read_text())["what"] == "second"

    with disk_cache.held(path, "first", no_wait):
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(60)
        time.sleep(0.05)
        order.append("first")
        # As the last step of a removal; what waits holds a mark without a name now.
        (path / disk_cache.MARK).unlink()
        path.rmdir()
    thread.join(60)
    assert order == ["first", "second"]
    assert (path / disk_cache.MARK).is_file()


def test_a_mark_of_a_maker_that_was_killed_is_ours(home):
    path = home / f"pixels-{KEY}"
    path.mkdir()
    (path / disk_cache.MARK).write_bytes(b"")
    assert [item.path for item in disk_cache.open_cache().entries()] == [path]
    (path / disk_cache.MARK).write_text('{"name": "package"}')
    assert disk_cache.open_cache().entries() == []


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("FLEDGE_CACHE", "")
    assert disk_cache.folder() == tmp_path / "fledge"
    monkeypatch.setenv("FLEDGE_CACHE", str(tmp_path / "own"))
    assert disk_cache.folder() == tmp_path / "own"
    assert disk_cache.open_cache().entries() == []
    assert not (tmp_path / "own").exists()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert disk_cache.shown(tmp_path / "own") == "~/own"


def test_the_budget_is_the_option_then_the_variable_and_fits_the_disk(monkeypatch, tmp_path):
    monkeypatch.setenv("FLEDGE_CACHE", str(tmp_path))
    assert disk_cache.wanted() == 10
    monkeypatch.setenv("FLEDGE_CACHE_GB", "0.25")
    assert disk_cache.wanted() == 0.25
    assert disk_cache.wanted(0) == 0
    assert disk_cache.open_cache(0).budget == 0
    assert 10**9 < disk_cache.open_cache(1e9).budget < 1e15
    for wrong in ("-1", "many", "nan", "inf"):
        monkeypatch.setenv("FLEDGE_CACHE_GB", wrong)
        with pytest.raises(OptionError, match=f"FLEDGE_CACHE_GB = {wrong}: use gigabytes"):
            disk_cache.wanted()
    with pytest.raises(OptionError, match=r"--cache-gb -1\.0: use gigabytes"):
        disk_cache.wanted(-1.0)


def test_sizes_are_told_as_a_person_reads_them():
    told = [disk_cache.gigabytes(size) for size in (0, 800_000, 99_000_000, 3.2e8, 1e10)]
    assert told == ["0 GB", "0.8 MB", "99.0 MB", "0.3 GB", "10 GB"]
