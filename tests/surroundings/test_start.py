"""What a command settles when it starts: streams, encoding, current folder, cache folder."""

from __future__ import annotations

import json
import os
import pty
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import surroundings
from tests.support.surroundings import ASCII, FLEDGE, LIKE_ANYONE, NO_NAME, Surrounding
from tests.support.tiny_bundle import altered, photo, tiny_bundle

NAME = "été\n'日本'"


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    folder = surroundings.workspace()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def bundle(place: Path) -> Path:
    folder = tiny_bundle(place / "my bundle")
    altered(folder, name=NAME, labels=("été", "hiver", "日本"))
    return folder


def script(code: str) -> tuple[str, ...]:
    """A process that runs `code` after `prepare`."""
    start = "import os, sys; from serving.utils import process; process.prepare()\n"
    return sys.executable, "-c", start + code


@pytest.mark.parametrize("streams", [">&-", "2>&-", "<&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_as_if_they_led_nowhere(place: Path, streams: str) -> None:
    """A file that is opened must not get the number of a stream, and what is printed with it."""
    code = (
        "print('shown'); print('told', file=sys.stderr); assert sys.stdin is not None\n"
        "with open('file', 'w') as file: number = file.fileno(); file.write('own')\n"
        "os.system('echo more; echo more >&2')\n"
        "assert number > 2; sys.stdout.flush()\n"
    )
    (place / "file").unlink(missing_ok=True)
    done = Surrounding(streams=streams).run(*script(code), cwd=place)
    assert done.returncode == 0
    assert (place / "file").read_text() == "own"
    assert done.stdout == (b"" if "1" in streams or " >&-" in f" {streams}" else done.stdout)
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("pipe", ["| true", "2>&1 | true"])
def test_work_goes_on_when_nobody_reads_the_output(place: Path, pipe: str) -> None:
    code = (
        "for number in range(3000): print('x' * 100); print('y' * 100, file=sys.stderr)\n"
        "open('done', 'w').close()\n"
    )
    (place / "done").unlink(missing_ok=True)
    done = Surrounding(pipe=pipe).run(*script(code), cwd=place)
    assert done.returncode == 0
    assert (place / "done").exists()
    assert b"Broken" not in done.stderr


def test_a_full_disk_is_told_and_is_exit_status_1(place: Path, bundle: Path) -> None:
    for buffered in ("", "1"):
        full = Surrounding({"PYTHONUNBUFFERED": buffered}, streams=">/dev/full")
        done = full.run(*FLEDGE, "inspect", bundle, cwd=place)
        assert done.returncode == 1
        assert done.stderr == b"fledge: standard output: No space left on device\n"


def test_a_slow_reader_of_a_pipe_that_does_not_block_loses_nothing(place: Path) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    code = "sys.stdout.write('x' * 1_000_000)"
    process = subprocess.Popen(script(code), stdout=writing, cwd=surroundings.ROOT)
    os.close(writing)
    with open(reading, "rb") as file:
        assert file.read() == b"x" * 1_000_000
    assert process.wait(30) == 0


LOCALES = {
    "Latin-1": lambda: surroundings.latin_1(),
    "Latin-1 without UTF-8 mode": lambda: {**surroundings.latin_1(), "PYTHONUTF8": "0"},
    "C": lambda: {"LC_ALL": "C"},
    "C without UTF-8": lambda: ASCII,
    "POSIX": lambda: {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0"},
    "unknown": lambda: {"LC_ALL": "xx_YY.UTF-8"},
}


@pytest.mark.parametrize("name", LOCALES)
def test_paths_and_files_are_utf8_whatever_the_locale(place: Path, name: str) -> None:
    code = (
        "name = '\\xe9t\\xe9'; assert sys.argv[1:] == [name, '\\udcff', ''], sys.argv\n"
        "assert sys.getfilesystemencoding() == 'utf-8'\n"
        "open('text', 'w').write(name); open(os.fsencode(name), 'w').close()\n"
        'import subprocess; child = \'open("child", "w").write("\\xe9t\\xe9")\'\n'
        "subprocess.run([sys.executable, '-c', child], check=True); print(name)\n"
    )
    words = ["été".encode(), b"\xff", b""]
    done = Surrounding(env=LOCALES[name]()).run(*script(code), *words, cwd=place)
    assert done.returncode == 0, done.stderr
    for file in ("text", "child"):
        assert (place / file).read_bytes() == "été".encode()
    assert (place / "été").exists()
    assert done.stdout == "été\n".encode()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "ascii:strict", "utf-16", "cp1252"])
def test_what_an_encoding_lacks_is_shown_by_escapes(
    place: Path, bundle: Path, encoding: str
) -> None:
    env = {"PYTHONIOENCODING": encoding}
    codec = encoding.partition(":")[0]
    done = Surrounding(env=env).run(*FLEDGE, "inspect", bundle, cwd=place)
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode(codec)
    assert ("\\u65e5\\u672c" in text) == (codec != "utf-16")
    done = Surrounding(env=env).run(*FLEDGE, "inspect", bundle, "--json", cwd=place)
    assert json.loads(done.stdout.decode(codec))["name"] == NAME
    done = Surrounding(env=env).run(*FLEDGE, "inspect", "/日本", cwd=place)
    assert done.returncode == 78
    assert done.stderr.decode(codec).count("\n") == 1
    done = Surrounding(env=env).run(*FLEDGE, "train", "--help", cwd=place)
    assert done.returncode == 0, done.stderr


def test_a_terminal_gets_the_encoding_of_its_locale(place: Path) -> None:
    env = Surrounding(env=surroundings.latin_1()).environment(place)
    main, other = pty.openpty()
    process = subprocess.Popen(script("print('été 日本')"), env=env, stdout=other, cwd=place)
    os.close(other)
    assert process.wait(30) == 0
    assert os.read(main, 1000) == "été \\u65e5\\u672c\r\n".encode("latin-1")
    os.close(main)


DELETED = 'mkdir gone; cd gone; rmdir "$PWD"'


@pytest.mark.parametrize("words", [["--help"], ["train"], ["inspect", "/x"], ["cache"]])
def test_a_deleted_current_folder_is_told_in_one_line(place: Path, words: list[str]) -> None:
    done = Surrounding(before=DELETED).run(*FLEDGE, *words, cwd=place)
    assert done.returncode == 2
    assert done.stderr == (
        b"fledge: the current folder was deleted; change to one that exists, as with: cd /\n"
    )


def test_a_user_without_name_and_home_gets_a_warning_and_a_folder_of_its_own(place: Path) -> None:
    temporary = place / "tmp"
    temporary.mkdir(exist_ok=True)
    temporary.chmod(0o1777)
    env = {"TMPDIR": str(temporary)}
    stranger = Surrounding(env, home=False, words=NO_NAME, root=True)
    own = temporary / f"fledge-{surroundings.STRANGER}"
    for _ in range(2):  # the second time the folder is there
        done = stranger.run(*FLEDGE, "cache", cwd=place)
        assert done.returncode == 0, done.stderr
        assert done.stderr.decode() == (
            f"warning: user id {surroundings.STRANGER} has no home folder: caches go to {own}; "
            "set XDG_CACHE_HOME to keep them elsewhere\n"
        )
        assert stat.S_IMODE(own.stat().st_mode) == 0o700
        assert own.stat().st_uid == surroundings.STRANGER
    own.chmod(0o770)  # others may write to it: not used any more
    done = stranger.run(*FLEDGE, "cache", cwd=place)
    assert done.returncode == 0, done.stderr
    assert f"caches go to {own}-".encode() in done.stderr


def test_what_needs_no_cache_says_nothing_of_it(place: Path, bundle: Path) -> None:
    stranger = Surrounding(home=False, words=NO_NAME, root=True)
    done = stranger.run(*FLEDGE, "inspect", bundle, cwd=place)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("variable", ["HOME", "XDG_CACHE_HOME"])
def test_a_cache_folder_that_can_not_be_written_to_is_replaced(place: Path, variable: str) -> None:
    locked = place / "locked"
    locked.mkdir(exist_ok=True)
    locked.chmod(0o555)
    env = {variable: str(locked), "TMPDIR": str(place)}
    done = Surrounding(env, words=LIKE_ANYONE).run(*FLEDGE, "cache", cwd=place)
    assert done.returncode == 0, done.stderr
    where = locked / ".cache" if variable == "HOME" else locked
    assert f"warning: {where} can't be written to: caches go to {place}/fledge-" in (
        done.stderr.decode()
    )
    assert done.stdout.decode().startswith(f"{place}/fledge-")


def test_without_any_place_to_write_commands_that_write_nothing_work(
    place: Path, bundle: Path
) -> None:
    locked = place / "locked"
    locked.mkdir(exist_ok=True)
    locked.chmod(0o555)
    env = {"HOME": str(locked), "TMPDIR": str(locked)}
    script = "mount --bind -o ro /tmp /tmp; mount --bind -o ro /var/tmp /var/tmp; " + 'exec "$@"'
    words = ("unshare", "--mount", "sh", "-c", script, "sh", *LIKE_ANYONE)
    nowhere = Surrounding(env, words=words, root=True)
    for command in (["cache"], ["inspect", bundle], ["layers", "--help"]):
        done = nowhere.run(*FLEDGE, *command, cwd=place)
        assert done.returncode == 0, done.stderr


@pytest.mark.process
@pytest.mark.parametrize("name", ["Latin-1", "C without UTF-8"])
def test_a_table_of_scores_names_files_that_exist(place: Path, bundle: Path, name: str) -> None:
    photos = place / "photos of été"
    names = ["é.jpg".encode(), b"\xff\xe9.jpg", "日本 'x'.jpg".encode(), b"a\nb.jpg", b"-x.jpg"]
    photos.mkdir(exist_ok=True)
    for number, one in enumerate(names):
        (photos / os.fsdecode(one)).write_bytes(photo(number))
    table = place / "tablé.csv"
    env = LOCALES[name]()
    words = ["score", photos, "--bundle", bundle, "--out", table, "--restart"]
    done = Surrounding(env=env).run(*FLEDGE, *words, cwd=place)
    assert done.returncode == 0, done.stderr
    import csv

    with table.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(names)
    assert all(os.path.exists(row["path"]) for row in rows)
    assert {row["label"] for row in rows} <= {"été", "hiver", "日本"}
    listed = b"\0".join(os.fsencode(photos) + b"/" + one for one in names)
    (place / "list").write_bytes(listed)
    words[1] = "-"
    done = Surrounding(env=env, streams="<list").run(*FLEDGE, *words, cwd=place)
    assert done.returncode == 0, done.stderr
