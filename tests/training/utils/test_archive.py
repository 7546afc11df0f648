"""Training data in archives: extracted once, as a folder would be read, and nothing silently."""

import io
import os
import shlex
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import fledge
from serving.errors import DataError
from serving.inputs import zip_archive
from tests.support.tar_files import KINDS, write_tar
from tests.support.tiny_bundle import photo
from tests.support.zip_files import end_record, entry, local, write_zip
from tests.training.conftest import SHORT, recipe_text
from training.config.sections import DataConfig
from training.data.dataset import load_dataset
from training.utils import archive, disk_cache

ROOT = Path(__file__).parents[3]
PHOTOS = {f"{name}/{i}.jpg": photo(10 * j + i) for j, name in enumerate("ab") for i in range(4)}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLEDGE_CACHE", str(tmp_path / "cache"))
    yield tmp_path
    for held in archive._held.values():
        held.close()
    archive._held.clear()


def names_of(dataset):
    found = {}
    for part in ("train", "valid", "test"):
        for path, label in getattr(dataset, part):
            found[path.relative_to(dataset.root).as_posix()] = (part, dataset.classes[label])
    return found


def write_folder(root, files):
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


@pytest.mark.parametrize("name", ["set.zip", "set.ZIP", "set.tar", "set.tar.gz", "set.tgz"])
def test_an_archive_is_the_same_data_set_as_its_folder(folder, name):
    if name.lower().endswith("zip"):
        write_zip(name, PHOTOS.items(), zipfile.ZIP_DEFLATED)
    else:
        write_tar(name, PHOTOS.items(), KINDS[name.removeprefix("set")])
    found = load_dataset(name)
    same = load_dataset(str(write_folder(folder / "plain", PHOTOS)))
    assert names_of(found) == names_of(same)
    assert found.fingerprint == same.fingerprint
    assert found.root.is_relative_to(folder / "cache")
    assert found.root.name == "set"
    assert all(path.read_bytes() == PHOTOS[path.relative_to(found.root).as_posix()]
               for path, _ in found.train)  # fmt: skip


def test_parts_and_label_tables_in_an_archive_are_read(folder):
    parts = {f"{part}/{name}": data for part in ("train", "valid") for name, data in PHOTOS.items()}
    assert len(load_dataset(write_zip("parts.zip", parts.items())).train) == 8
    flat = {f"{number}.jpg": data for number, data in enumerate(PHOTOS.values())}
    table = "id,label\n" + "".join(f"{name},{'ab'[i % 2]}\n" for i, name in enumerate(flat))
    write_zip("table.zip", [*flat.items(), ("labels.csv", table.encode())])
    config = DataConfig(csv="labels.csv", columns=("id", "label"))
    assert load_dataset("table.zip", config=config).classes == ("a", "b")


def test_it_is_extracted_once_and_again_when_it_changes(folder, capsys):
    write_zip("set.zip", PHOTOS.items())
    first = archive.extracted("set.zip")
    assert "8 photos extracted" in capsys.readouterr().err
    assert archive.extracted("set.zip") == first
    assert capsys.readouterr().err == ""
    write_zip("set.zip", [*PHOTOS.items(), ("a/new.jpg", photo(99))])
    second = archive.extracted("set.zip")
    assert second != first
    assert (second / "a/new.jpg").exists()


def test_what_is_passed_over_is_counted_by_reason(folder, capsys):
    outside = {"../up.jpg": b"x", "/tmp/fledge-abs.jpg": b"x", "C:/x.jpg": b"x"}
    others = {
        "__MACOSX/a/._1.jpg": b"x",
        ".git/HEAD": b"x",
        "a/.x.jpg": b"x",
        "a/notes.doc": b"x",
        "README": b"text",
    }
    with zipfile.ZipFile("set.zip", "w") as file:
        for name, data in {**PHOTOS, **outside, **others, "labels.csv": b"a,b"}.items():
            file.writestr(zipfile.ZipInfo(name), data)
        with pytest.warns(UserWarning, match="Duplicate"):
            file.writestr(zipfile.ZipInfo("a/0.jpg"), photo(77))
        link = zipfile.ZipInfo("a/link.jpg")
        link.external_attr, link.create_system = 0o120777 << 16, 3
        file.writestr(link, "/etc/hostname")
        file.writestr(zipfile.ZipInfo("b/suffixless"), photo(50))
    root = archive.extracted("set.zip")
    line = capsys.readouterr().err.splitlines()[-1]
    assert "set.zip: 9 photos and 1 table extracted; passed over: " in line
    for reason in (
        "3 with a name that leads out of the folder",
        "2 files and folders of systems and tools",
        "1 hidden file or folder",
        "2 files that are no images",
        "1 replaced by a later one of the same name",
        "1 unreadable",
        "(a/link.jpg: not a file but a link in an archive)",
    ):
        assert reason in line
    extracted = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert extracted == {*PHOTOS, "labels.csv", "b/suffixless"}
    assert (root / "a/0.jpg").read_bytes() == photo(77)
    assert not Path("/tmp/fledge-abs.jpg").exists()
    assert not list(folder.glob("*.jpg"))


def test_an_archive_that_is_not_whole_is_refused_and_leaves_nothing(folder):
    write_tar("set.tar.gz", PHOTOS.items(), "w:gz")
    data = Path("set.tar.gz").read_bytes()
    Path("set.tar.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"set\.tar\.gz: (broken|cut off)"):
        load_dataset("set.tar.gz")
    assert not [path for path in folder.joinpath("cache").rglob("*") if path.suffix == ".jpg"]
    write_zip("set.zip", PHOTOS.items())
    Path("set.zip").write_bytes(Path("set.zip").read_bytes()[:-30])
    with pytest.raises(DataError, match="broken, or no zip archive"):
        load_dataset("set.zip")


def test_an_archive_without_photos_says_what_is_in_it(folder):
    write_zip("inner.zip", PHOTOS.items())
    write_zip("set.zip", [("inner.zip", Path("inner.zip").read_bytes()), ("a.csv", b"a,b")])
    with pytest.raises(
        DataError,
        match=r"set\.zip: no photo in it: 0 photos and 1 table .*\.zip\); it holds archives "
        r"\(inner\.zip\): unpack it, and give one of them",
    ):
        load_dataset("set.zip")
    assert disk_cache.open_cache().entries() == []


@pytest.mark.parametrize(
    ("photos", "says"),
    [
        (["top/train/cat.{}.jpg", "top/train/dog.{}.jpg", "top/test1/{}.jpg"], "/top has test1/ ("),
        (["a/{}.jpg"], " has one class, 'a'"),
    ],
)
def test_an_error_about_the_content_names_the_archive_as_it_was_given(folder, photos, says):
    names = [name.format(i) for name in photos for i in range(4)]
    write_zip("my set.zip", [(name, photo(i)) for i, name in enumerate(names)])
    for given in ("my set.zip", str(folder / "my set.zip")):
        with pytest.raises(DataError) as caught:
            load_dataset(given)
        assert f"{given}{says}" in str(caught.value)
        assert str(folder / "cache") not in str(caught.value)


def test_a_folder_in_an_archive_that_is_told_as_remedy_can_be_given(folder):
    names = [f"{outer}/{c}/{i}.jpg" for outer in ("2023", "20 24") for c in "ab" for i in range(4)]
    write_zip("set.zip", [(name, photo(i)) for i, name in enumerate(names)])
    with pytest.raises(DataError, match=r"^set\.zip has '20 24/', '2023/' with") as caught:
        load_dataset("set.zip")
    given = shlex.split(str(caught.value).partition("--data ")[2])[0].rstrip(";")
    assert load_dataset(given).classes == ("a", "b")


def test_an_encrypted_archive_and_another_kind_are_refused(folder):
    head = local(b"a/1.jpg", b"data", flags=1)
    directory = entry(b"a/1.jpg", b"data", flags=1)
    Path("set.zip").write_bytes(head + directory + end_record(1, len(directory), len(head)))
    with pytest.raises(DataError, match=r"a/1\.jpg is encrypted; unpack the archive with its pass"):
        load_dataset("set.zip")
    Path("set.7z").write_bytes(b"7z")
    with pytest.raises(DataError, match="a 7z archive is not read; unpack it, or pack it as zip"):
        load_dataset("set.7z")


def test_the_size_is_limited_by_the_cache_and_its_variable_is_named(folder, monkeypatch):
    monkeypatch.setenv("FLEDGE_CACHE_GB", "0.000004")
    write_zip("set.zip", PHOTOS.items())
    with pytest.raises(DataError, match=r"larger than the cache may be, .*FLEDGE_CACHE_GB"):
        load_dataset("set.zip")
    assert disk_cache.open_cache().entries() == []
    monkeypatch.setenv("FLEDGE_CACHE_GB", "1")
    assert load_dataset("set.zip").classes == ("a", "b")


def test_the_number_of_files_is_limited(folder, monkeypatch):
    write_zip("set.zip", PHOTOS.items())
    monkeypatch.setattr(archive, "MAX_FILES", 7)
    with pytest.raises(DataError, match="more than 7 photos and tables"):
        load_dataset("set.zip")
    monkeypatch.setattr(zip_archive, "MAX_ENTRIES", 7)
    with pytest.raises(DataError, match="more than the 7 members"):
        load_dataset("set.zip")


def test_the_command_lists_and_clears_it_unless_it_is_in_use(folder, capsys):
    write_zip("set.zip", PHOTOS.items())
    archive.extracted("set.zip")
    size = sum(len(data) for data in PHOTOS.values())
    assert disk_cache.open_cache().size() == pytest.approx(size, abs=100)
    capsys.readouterr()
    assert fledge.main(["cache"]) == 0
    assert "archive-" in (out := capsys.readouterr().out)
    assert f"files of {folder / 'set.zip'}" in out
    assert fledge.main(["cache", "--clear"]) == 0
    assert "not removed: a run is using it" in capsys.readouterr().out
    (held,) = archive._held.values()
    held.close()
    archive._held.clear()
    assert fledge.main(["cache", "--clear"]) == 0
    assert "not removed" not in capsys.readouterr().out
    assert list((folder / "cache").iterdir()) == []
    assert archive.extracted("set.zip").is_dir()


def test_a_killed_extraction_is_done_again(folder):
    write_zip("set.zip", PHOTOS.items())
    root = archive.extracted("set.zip")
    (root.parents[1] / "index").unlink()  # the last file that is written
    (root / "a/0.jpg").write_bytes(b"half")
    for held in archive._held.values():
        held.close()
    archive._held.clear()
    assert archive.extracted("set.zip") == root
    assert (root / "a/0.jpg").read_bytes() == PHOTOS["a/0.jpg"]


@pytest.mark.process
def test_two_processes_extract_it_once(folder):
    write_zip("set.zip", [(f"{n % 9}/{n}.jpg", b"x" * 1000) for n in range(2000)])
    code = """
import sys
from training.utils import archive
print(archive.extracted("set.zip"))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    done = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0, 0], done
    assert done[0][0] == done[1][0]
    assert sum("photos extracted" in err for _, err in done) == 1
    assert len(list(Path(done[0][0].strip()).rglob("*.jpg"))) == 2000


def test_a_cache_that_cannot_be_written_is_one_line(folder, monkeypatch):
    Path("file").write_text("")
    monkeypatch.setenv("FLEDGE_CACHE", str(folder / "file"))
    write_zip("set.zip", PHOTOS.items())
    with pytest.raises(DataError, match=r"can't be extracted: .*; unpack it, or set FLEDGE_CACHE"):
        load_dataset("set.zip")


def test_names_that_the_disk_takes_for_one_are_refused(folder, monkeypatch):
    # As on a disk that ignores case: the second file exists already.
    write_zip("set.zip", [*PHOTOS.items(), ("a/X.jpg", photo(1))])
    opened = os.open

    def ignoring_case(path, flags, *more, **kwargs):
        if str(path).endswith("X.jpg"):
            raise FileExistsError(17, "File exists", str(path))
        return opened(path, flags, *more, **kwargs)

    monkeypatch.setattr(archive.os, "open", ignoring_case)
    with pytest.raises(DataError, match=r"a/X\.jpg differs from another name only in case"):
        load_dataset("set.zip")


def test_preview_reads_an_archive(folder, capsys):
    write_zip("my set.zip", PHOTOS.items())
    assert fledge.main(["preview", "my set.zip", "--out", "preview"]) == 0
    assert "8 photos" in capsys.readouterr().out


def test_a_tar_member_of_no_size_limit_is_not_extracted(folder, capsys):
    with tarfile.open("set.tar", "w") as file:
        for name, data in PHOTOS.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
        hard = tarfile.TarInfo("a/hard.jpg")
        hard.type, hard.linkname = tarfile.LNKTYPE, "a/0.jpg"
        file.addfile(hard)
    archive.extracted("set.tar")
    assert "1 unreadable (a/hard.jpg: not a file but a link" in capsys.readouterr().err


@pytest.mark.process
def test_train_evaluate_and_resume_take_an_archive_and_extract_it_again(folder, capsys):
    write_zip("set.zip", PHOTOS.items())
    Path("tiny.toml").write_text(recipe_text(SHORT))
    assert fledge.main(["train", "tiny.toml", "--data", "set.zip", "--out", "run"]) == 0
    folders = load_dataset("set.zip")
    for held in archive._held.values():
        held.close()
    archive._held.clear()
    assert fledge.main(["cache", "--clear"]) == 0
    assert not folders.root.exists()
    capsys.readouterr()
    assert fledge.main(["evaluate", "run"]) == 0  # extracts it again
    assert "8 photos extracted" in capsys.readouterr().err
    Path("moved").mkdir()
    Path("set.zip").rename("moved/set.zip")
    assert fledge.main(["evaluate", "run", "--data", "moved/set.zip"]) == 0
    assert "8 photos extracted" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["zip", "tar"])
def test_names_that_can_be_no_file_beside_the_others_are_counted_and_told(folder, form, capsys):
    files = [*PHOTOS.items(), ("a/1:2.jpg", photo(90)), ("1:2.jpg", photo(91))]
    files += [("b", photo(92)), ("a/0.jpg/x.jpg", photo(93)), (f"a/{'n' * 300}.jpg", photo(94))]
    files += [("C:/a/x.jpg", photo(95))]
    write_zip("set.zip", files) if form == "zip" else write_tar("set.tar", files, KINDS[".tar"])
    root = archive.extracted(f"set.{form}")
    told = capsys.readouterr().err
    assert (root / "a/1:2.jpg").is_file()
    assert (root / "1:2.jpg").is_file()
    assert sorted(path.name for path in (root / "b").iterdir()) == [f"{i}.jpg" for i in range(4)]
    assert f"{len(PHOTOS) + 2} photos extracted" in told
    assert "1 with a name that leads out of the folder" in told
    assert "3 unreadable (b: a folder has the same name" in told
    assert "a/0.jpg/x.jpg: one of its folders is a file, too" in told
