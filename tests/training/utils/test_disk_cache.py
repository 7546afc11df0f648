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
def cache_folder(tmp_path, monkeypatch):
    """The folder FLEDGE_CACHE, with files in it that are not the cache's."""
    folder = tmp_path / "cache"
    (folder / "letters").mkdir(parents=True)
    (folder / "letters" / "index").write_text("mine")
    (folder / "index").write_text("mine")
    (folder / f"pixels-{KEY[::-1]}").mkdir()  # no entry.json: not an entry
    (folder / f"pixels-{KEY[::-1]}" / "index").write_text("mine")
    monkeypatch.setenv("FLEDGE_CACHE", str(folder))
    return folder


def no_wait():
    raise AssertionError("no other process holds the lock")


def entry(cache, key, size, used, kind="pixels"):
    path = cache.folder / f"{kind}-{key * 32}"
    with disk_cache.locked_entry(path, f"entry {key}", no_wait):
        (path / "index").write_bytes(b"")
        (path / f"rows-{key * 16}.bin").write_bytes(bytes(size))
    os.utime(path / disk_cache.ENTRY_FILE, (used, used))
    return path


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_clear_removes_only_entries(cache_folder, capsys):
    before = contents(cache_folder)
    cache = disk_cache.open_cache()
    entry(cache, "a", 1000, 1)
    entry(cache, "b", 2000, 2, "activations")
    target = cache_folder / "letters"
    (cache_folder / f"pixels-{'c' * 32}").symlink_to(target, target_is_directory=True)
    shared = entry(cache, "d", 500, 3)
    (shared / "notes.txt").write_text("mine")
    assert fledge.main(["cache"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert str(cache_folder) in out[0]
    assert [line.rpartition("  ")[2] for line in out[1:]] == ["entry d", "entry b", "entry a"]
    assert fledge.main(["cache", "--clear"]) == 0
    assert capsys.readouterr().out.startswith("0.0 MB freed")
    assert contents(cache_folder) == before | {shared / "notes.txt": b"mine"}
    assert disk_cache.open_cache().entries() == []
    assert (cache_folder / f"pixels-{'c' * 32}").is_symlink()


def test_least_recently_used_entries_are_evicted_first_except_locked_ones(cache_folder):
    cache = disk_cache.DiskCache(cache_folder, 3500)
    a, b, c = (entry(cache, key, 1000, used) for key, used in (("a", 30), ("b", 10), ("c", 20)))
    assert [item.path for item in cache.entries()] == [b, c, a]
    assert cache.evict(500, set())
    assert cache.size() == 3000
    assert cache.evict(1000, {b.name})
    assert (a.exists(), b.exists(), c.exists()) == (True, True, False)
    disk_cache.mark_used(b)
    with disk_cache.locked_entry(a, "entry a", no_wait):
        assert not cache.evict(3000, {b.name})
        assert a.exists()
        assert cache.clear()[1][0].path == a
    assert not b.exists()
    assert cache.evict(3000, set())
    assert not a.exists()
    assert not cache.evict(3501, set())


def test_a_second_process_waits_for_the_lock_and_recreates_a_removed_entry(cache_folder):
    path = cache_folder / f"pixels-{KEY}"
    order, waiting = [], threading.Event()

    def second():
        with disk_cache.locked_entry(path, "second", waiting.set):
            order.append("second")
            assert json.loads((path / disk_cache.ENTRY_FILE).read_text())["what"] == "second"

    with disk_cache.locked_entry(path, "first", no_wait):
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(60)
        time.sleep(0.05)
        order.append("first")
        # The last step of a removal: the waiting thread has the deleted file open now.
        (path / disk_cache.ENTRY_FILE).unlink()
        path.rmdir()
    thread.join(60)
    assert order == ["first", "second"]
    assert (path / disk_cache.ENTRY_FILE).is_file()


def test_an_empty_entry_file_belongs_to_an_entry(cache_folder):
    path = cache_folder / f"pixels-{KEY}"
    path.mkdir()
    (path / disk_cache.ENTRY_FILE).write_bytes(b"")
    assert [item.path for item in disk_cache.open_cache().entries()] == [path]
    (path / disk_cache.ENTRY_FILE).write_text('{"name": "package"}')
    assert disk_cache.open_cache().entries() == []


def test_the_cache_folder_is_the_setting_or_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("FLEDGE_CACHE", "")
    assert disk_cache.cache_folder() == tmp_path / "fledge"
    monkeypatch.setenv("FLEDGE_CACHE", str(tmp_path / "own"))
    assert disk_cache.cache_folder() == tmp_path / "own"
    assert disk_cache.open_cache().entries() == []
    assert not (tmp_path / "own").exists()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert disk_cache.abbreviate_home(tmp_path / "own") == "~/own"


def test_the_budget_is_the_option_then_the_variable_within_the_free_disk(monkeypatch, tmp_path):
    monkeypatch.setenv("FLEDGE_CACHE", str(tmp_path))
    assert disk_cache.budget_gb() == 10
    monkeypatch.setenv("FLEDGE_CACHE_GB", "0.25")
    assert disk_cache.budget_gb() == 0.25
    assert disk_cache.budget_gb(0) == 0
    assert disk_cache.open_cache(0).budget == 0
    assert 10**9 < disk_cache.open_cache(1e9).budget < 1e15
    for wrong in ("-1", "many", "nan", "inf"):
        monkeypatch.setenv("FLEDGE_CACHE_GB", wrong)
        with pytest.raises(OptionError, match=f"FLEDGE_CACHE_GB = {wrong}: use gigabytes"):
            disk_cache.budget_gb()
    with pytest.raises(OptionError, match=r"--cache-gb -1\.0: use gigabytes"):
        disk_cache.budget_gb(-1.0)


def test_sizes_are_formatted_in_megabytes_or_gigabytes():
    sizes = [disk_cache.format_size(size) for size in (0, 800_000, 99_000_000, 3.2e8, 1e10)]
    assert sizes == ["0 GB", "0.8 MB", "99.0 MB", "0.3 GB", "10 GB"]
