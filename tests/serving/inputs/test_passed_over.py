"""What a search for images passes over: system folders, own outputs, other files; counted."""

import csv
import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fledge
from serving.bundle.storage import MANIFEST
from serving.inputs import file_kinds, sources
from serving.inputs.passed_over import PassedOver, Reason
from serving.scoring.copy_by_label import copy_by_label
from serving.scoring.rows import ScoreRow
from tests.support.tar_files import write_tar
from tests.support.tiny_bundle import photo, tiny_bundle

SYSTEM = (
    *("@eaDir", "@EADIR", ".@__thumb", "#recycle", "#snapshot", "@Recycle", "$RECYCLE.BIN"),
    *("System Volume Information", ".Trash-1000", ".Trashes", ".Spotlight-V100", ".fseventsd"),
    *(".thumbnails", "lost+found", ".git", ".svn", "CVS", ".ipynb_checkpoints", "__MACOSX"),
    *(".idea", ".vscode", ".venv", "node_modules", "__pycache__", "FOUND.000", "My.lrdata"),
)
JPEG = photo(1)


def create(root: Path, *names: str, data: bytes = JPEG) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def found(*words: str | Path) -> tuple[list[str], PassedOver]:
    passed = PassedOver()
    names = list(sources.find([os.fspath(word) for word in words], passed_over=passed))
    return names, passed


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", SYSTEM)
def test_folders_of_systems_and_tools_are_passed_over_at_every_depth(
    folder: Path, name: str
) -> None:
    create(folder, "in/a/1.jpg", f"in/{name}/1.jpg", f"in/a/{name}/1.jpg/THUMB.jpg")
    names, passed = found("in")
    assert names == ["in/a/1.jpg"]
    assert passed.totals() == {"system": 2}
    assert passed.line() == (f"passed over: 2 files and folders of systems and tools ({name})")
    assert found("in/**/*.jpg")[0] == found("in/*")[0] == names
    # What is named is searched: as an input, and in a pattern.
    assert found(f"in/{name}")[0] == [f"in/{name}/1.jpg"]
    deep = [f"in/{name}/1.jpg", f"in/a/{name}/1.jpg/THUMB.jpg"]
    assert sorted(found(f"in/**/{name}/**/*.jpg")[0]) == sorted(deep)


@pytest.mark.parametrize("name", ["eaDir", "recycle", "git", "Recycler", "trash", "cvs", "cache"])
def test_classes_with_similar_names_are_not_passed_over(folder: Path, name: str) -> None:
    create(folder, f"in/{name}/1.jpg")
    names, passed = found("in")
    assert names == [f"in/{name}/1.jpg"]
    assert not passed


@pytest.mark.parametrize("name", ["Thumbs.db", "desktop.ini", "._1.jpg", ".DS_Store"])
def test_files_of_systems_are_counted(folder: Path, name: str) -> None:
    create(folder, "in/1.jpg", f"in/{name}")
    assert (found("in")[0], found("in")[1].totals()) == (["in/1.jpg"], {"system": 1})


def test_hidden_files_and_folders_are_counted(folder: Path) -> None:
    create(folder, "in/1.jpg", "in/.2.jpg", "in/.more/3.jpg")
    names, passed = found("in")
    assert names == ["in/1.jpg"]
    assert passed.totals() == {"hidden": 2}


@pytest.mark.parametrize("name", ["1", "IMG_0001", "1.jpg_large", "1.jpg?itok=x", "1.dat", "1.pgm"])
def test_images_are_recognised_by_their_content(folder: Path, name: str) -> None:
    create(folder, f"in/{name}")
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2)).save(buffer, "BMP")
    create(folder, "in/bitmap", data=buffer.getvalue())
    assert found("in")[0] == sorted([f"in/{name}", "in/bitmap"])
    assert not found("in")[1]


@pytest.mark.parametrize(
    ("name", "data", "reason", "detail"),
    [
        ("1.pgm", b"P5 3 2 255\n123456", "unsupported-format", "PNM"),
        ("1.nef", b"II*\0", "unsupported-format", "raw .nef"),
        ("notes.txt", JPEG, "not-an-image", ".txt"),
        ("README", b"hello", "not-an-image", "no suffix"),
        ("a.weird", b"hello", "not-an-image", ".weird"),
        ("paper", b"%PDF-1.4", "not-an-image", "no suffix"),
        ("1.jpg.bak", JPEG, "backup", ".bak"),
        ("1.jpg_original", JPEG, "backup", ".jpg_original"),
        ("1.jpg~", JPEG, "backup", ".jpg~"),
        ("1.jpg.crdownload", JPEG, "backup", ".crdownload"),
        ("empty", b"", "empty-file", "no suffix"),
    ],
)
def test_other_files_are_counted_by_reason(
    folder: Path, name: str, data: bytes, reason: str, detail: str
) -> None:
    create(folder, "in/0.jpg")
    create(folder, f"in/{name}", data=data)
    names, passed = found("in")
    assert names == ["in/0.jpg"]
    assert passed.to_json() == {reason: {detail: 1}}


def test_links_loops_and_pipes_are_counted(folder: Path) -> None:
    create(folder, "in/a/1.jpg", "elsewhere/2.jpg")
    (folder / "in/empty").mkdir()
    (folder / "in/a/linked").symlink_to(folder / "elsewhere")
    (folder / "in/a/up").symlink_to(folder / "in")
    (folder / "in/gone").symlink_to("nowhere")
    os.mkfifo(folder / "in/pipe")
    names, passed = found("in")
    assert names == ["in/a/1.jpg", "in/a/linked/2.jpg"]
    assert passed.totals() == {
        "empty-folder": 1, "broken-link": 1, "link-loop": 1, "special-file": 1,
    }  # fmt: skip


def test_the_marks_are_those_that_the_commands_write(folder: Path) -> None:
    from training.run.folder import RUN_FILE

    assert {RUN_FILE, MANIFEST, file_kinds.MARK} <= set(file_kinds._MARKS)


def test_bundles_and_copies_are_passed_over_and_searched_if_they_are_named(folder: Path) -> None:
    create(folder, "in/1.jpg")
    tiny_bundle(folder / "in/deep/bundle")
    copy_by_label(folder / "in/sorted", [ScoreRow("in/1.jpg", "ok", "cat")])
    names, passed = found("in")
    assert names == ["in/1.jpg"]
    assert passed.to_json() == {"own-output": {"bundle": 1, "sorted": 1}}
    assert found("in/sorted")[0] == ["in/sorted/cat/1.jpg"]
    golden = found("in/deep/bundle")[0]
    assert golden
    assert all("/golden/" in name for name in golden)


def test_copies_into_a_folder_with_other_files_do_not_hide_these(folder: Path) -> None:
    create(folder, "in/1.jpg", "in/mine/2.jpg")
    copy_by_label(folder / "in/mine", [ScoreRow("in/1.jpg", "ok", "cat")])
    assert found("in")[0] == ["in/1.jpg", "in/mine/2.jpg", "in/mine/cat/1.jpg"]


def test_photos_extracted_into_a_cache_among_the_photos_are_passed_over(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training.utils.archive import extracted

    monkeypatch.setenv("FLEDGE_CACHE", str(folder / "in/cache"))
    create(folder, "in/1.jpg")
    with zipfile.ZipFile(folder / "set.zip", "w") as archive:
        archive.writestr("a/2.jpg", JPEG)
    extracted(folder / "set.zip")
    names, passed = found("in")
    assert names == ["in/1.jpg"]
    assert passed.totals()["own-output"] == 1


@pytest.mark.parametrize("name", ["run.json", "manifest.json", ".fledge.json", "entry.json"])
@pytest.mark.parametrize("content", ["{}", "[]", "no json", '{"name": "my data"}'])
def test_files_of_others_with_the_name_of_a_mark_hide_nothing(
    folder: Path, name: str, content: str
) -> None:
    create(folder, "in/a/1.jpg")
    (folder / "in/a" / name).write_text(content)
    assert found("in")[0] == ["in/a/1.jpg"]


def test_pictures_that_fledge_drew_are_passed_over_and_those_of_others_are_not(
    folder: Path,
) -> None:
    from training.preview import figure, scan

    create(folder, "in/1.jpg")
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(folder / "in/augment.png")
    figure.draw([scan.photo_stats(folder / "in/1.jpg", "train", "a")], ("a",),
                folder / "in/preview.png")  # fmt: skip
    for words in (["in"], ["in/*.jpg", "in/*.png"]):
        names, passed = found(*words)
        assert sorted(names) == ["in/1.jpg", "in/augment.png"]
        assert passed.to_json() == {"own-output": {"preview.png": 1}}


def test_environments_and_caches_are_recognised_by_their_mark(folder: Path) -> None:
    create(folder, "in/1.jpg", "in/env/share/2.jpg", "in/store/3.jpg")
    (folder / "in/env/pyvenv.cfg").write_text("home = /usr/bin\n")
    (folder / "in/store/CACHEDIR.TAG").write_text(
        "Signature: 8a477f597d28d172789f06886806bc55\n# made by a tool\n"
    )
    names, passed = found("in")
    assert names == ["in/1.jpg"]
    assert passed.to_json() == {"system": {"env": 1, "store": 1}}


def test_members_of_archives_follow_the_same_rule(folder: Path) -> None:
    write_tar(
        "a.tar",
        [
            *(("cat/1.jpg", JPEG), ("__MACOSX/cat/._1.jpg", b"x"), ("cat/@eaDir/1.jpg", JPEG)),
            *(("cat/.2.jpg", JPEG), ("cat/3.qoi", b"x"), ("labels.csv", b"x"), ("./4.jpg", JPEG)),
        ],
    )
    names, passed = found("a.tar")
    assert [name.partition("::")[2] for name in names] == ["cat/1.jpg", "./4.jpg"]
    assert passed.to_json() == {
        "system": {"__MACOSX": 1, "@eaDir": 1},
        "hidden": {".2.jpg": 1},
        "unsupported-format": {"QOI": 1},
        "not-an-image": {".csv": 1},
    }


def test_addresses_follow_the_same_rule(tmp_path: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    for name in ("a/1.jpg", "a/@eaDir/1.jpg", "a/2.qoi", ".git/x.jpg"):
        memory.pipe_file(f"/rule/{name}", JPEG)
    try:
        names, passed = found("memory://rule")
        assert names == ["memory:///rule/a/1.jpg"]
        assert passed.totals() == {"system": 2, "unsupported-format": 1}
        assert found("memory://rule/**/*.jpg")[0] == names
    finally:
        memory.rm("/rule", recursive=True)


def test_score_tells_the_counts_and_writes_them_into_the_summary(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_bundle(folder / "bundle")
    create(folder, "in/1.jpg", "in/@eaDir/2.jpg", "in/notes.txt")
    words = ["score", "in", "--bundle", "bundle", "--out", "s.csv", "--device", "cpu"]
    assert fledge.main(words) == 0
    line = (
        "passed over: 1 file or folder of a system or tool (@eaDir), 1 file that is no image (.txt)"
    )
    assert line in capsys.readouterr().out.splitlines()
    summary = json.loads((folder / "s.summary.json").read_text())
    assert summary["passed_over"] == {"system": 1, "not-an-image": 1}
    with (folder / "s.csv").open(newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == ["in/1.jpg"]


def test_a_second_job_in_the_same_folder_scores_nothing_that_fledge_made(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    create(folder, "1.jpg", "b/2.jpg")
    tiny_bundle(folder / "bundle")
    words = ["score", "--bundle", "bundle", "--device", "cpu", "--out", "s.csv"]
    assert fledge.main([*words, "b", "--copy-to", "sorted"]) == 0
    for _ in range(2):
        assert fledge.main([*words, "."]) == 0
        with (folder / "s.csv").open(newline="") as file:
            assert [row["path"] for row in csv.DictReader(file)] == ["./1.jpg", "./b/2.jpg"]
        assert "2 outputs of Fledge (bundle 1, sorted 1)" in capsys.readouterr().out


def test_counts_survive_an_interruption_of_the_job(folder: Path) -> None:
    passed = PassedOver()
    passed(Reason.SYSTEM, "x/@eaDir", "@eaDir")
    passed(Reason.NOT_AN_IMAGE, "x/\udcff.txt", ".\udcff")
    again = PassedOver.from_json(json.loads(json.dumps(passed.to_json())))
    assert again.line() == passed.line()
    for wrong in ([], {"system": 1}, {"system": {"a": "1"}}, {"nonsense": {"a": 1}}):
        with pytest.raises(ValueError, match=r"."):
            PassedOver.from_json(wrong)


def test_the_number_of_details_is_bounded() -> None:
    passed = PassedOver()
    for number in range(10_000):
        passed(Reason.HIDDEN, "", f".{number}")
    assert passed.totals() == {"hidden": 10_000}
    assert len(passed.to_json()["hidden"]) <= 101
    assert len(passed.line()) < 200
