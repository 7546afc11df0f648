"""`--copy-to` and `--root` with lists, labels and folders from elsewhere."""

from __future__ import annotations

import csv
import io
import os
import stat
import tarfile
from pathlib import Path

import pytest

import fledge
from serving.errors import BrokenImage, OptionError, TooLarge
from serving.inputs import local_files, sources
from serving.scoring.copy_by_label import check_copies, copy_by_label
from serving.scoring.rows import ScoreRow
from tests.support.tiny_bundle import photo, tiny_bundle

SECRET = b"root:$6$salt$hash:19000:0:99999:7:::\n"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "b")


def score(bundle: Path, folder: Path, *words: str) -> int:
    return fledge.main(
        ["score", *words, "--bundle", str(bundle), "--out", str(folder / "out.csv"),
         "--device", "cpu", "--workers", "1"]
    )  # fmt: skip


def errors(folder: Path) -> dict[str, str]:
    with (folder / "out.csv").open(newline="") as file:
        return {Path(row["path"]).name: row["error"] for row in csv.DictReader(file)}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_list_of_secrets_copies_none_of_them(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "secret.jpg").write_bytes(SECRET)
    (tmp_path / "secret.jpg").chmod(0o600)
    (tmp_path / "key.png").write_bytes(b"BM-----BEGIN PRIVATE KEY-----\n" * 9)
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "photo.jpg").write_bytes(photo(1))
    (tmp_path / "photo.jpg").chmod(0o600)
    (tmp_path / "cut.jpg").write_bytes(photo(2)[:600])
    (tmp_path / "cut.jpg").chmod(0o640)
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    names = ["secret.jpg", "key.png", "empty.jpg", "photo.jpg", "cut.jpg", "pipe.jpg", "link.jpg"]
    paths = [*(str(tmp_path / name) for name in names), "/dev/zero", "/proc/self/environ", "/"]
    (tmp_path / "list.txt").write_text("\n".join(paths))
    copies = tmp_path / "copies"
    assert score(bundle, tmp_path, str(tmp_path / "list.txt"), "--copy-to", str(copies)) == 0
    found = {path.name: path for path in copies.rglob("*/*") if path.is_file()}
    assert found.keys() == {"photo.jpg", "cut.jpg"}
    assert mode(found["photo.jpg"]) == 0o600
    assert mode(found["cut.jpg"]) == 0o640
    assert found["cut.jpg"].parent.name == "_errors"
    printed = capsys.readouterr().out
    assert "copied 2 images" in printed
    assert "3 could not be read" in printed
    assert "5 are no images and were not copied" in printed


def test_a_file_that_is_replaced_after_it_was_scored_is_not_copied(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(SECRET)
    line = copy_by_label(tmp_path / "out", [ScoreRow(str(tmp_path / "a.jpg"), "ok", "cat")])
    assert line.startswith("copied 0 images")
    assert not list(tmp_path.rglob("out/*/*"))


@pytest.mark.parametrize("permissions", [0o400, 0o444, 0o604, 0o755, 0o4755])
def test_a_copy_has_the_permissions_of_its_source(tmp_path: Path, permissions: int) -> None:
    (tmp_path / "a.jpg").write_bytes(photo(1))
    (tmp_path / "a.jpg").chmod(permissions)
    for _ in range(2):
        copy_by_label(tmp_path / "out", [ScoreRow(str(tmp_path / "a.jpg"), "ok", "cat")])
        assert mode(tmp_path / "out" / "cat" / "a.jpg") == permissions & 0o777


def test_a_member_has_the_permissions_of_its_archive(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        info = tarfile.TarInfo("a.jpg")
        info.size, info.mode = len(photo(1)), 0o4777
        file.addfile(info, io.BytesIO(photo(1)))
    (tmp_path / "a.tar").chmod(0o640)
    copy_by_label(tmp_path / "out", [ScoreRow(f"{tmp_path}/a.tar::a.jpg", "ok", "cat")])
    assert mode(tmp_path / "out" / "cat" / "a.jpg") == 0o640


def test_no_two_labels_are_merged(tmp_path: Path) -> None:
    labels = ["a/b", "a_b", "A", "a", "_errors", "CON", "c.", "c", "..", "x" * 300, "x" * 301]
    rows = []
    for number, label in enumerate([*labels, None]):
        path = tmp_path / "in" / str(number) / "1.jpg"
        path.parent.mkdir(parents=True)
        path.write_bytes(photo(number))
        rows.append(ScoreRow(str(path), "ok" if label else "error", label))
    line = copy_by_label(tmp_path / "out", rows, labels=labels)
    copies = [path for path in (tmp_path / "out").rglob("*/*") if path.is_file()]
    assert len(copies) == len({path.parent for path in copies}) == len(rows)
    assert {path.parent.parent for path in copies} == {tmp_path / "out"}
    assert len({path.parent.name.casefold() for path in copies}) == len(rows)
    assert (tmp_path / "out" / "_errors" / "1.jpg").read_bytes() == photo(len(labels))
    assert (tmp_path / "out" / "a_b" / "1.jpg").read_bytes() == photo(1)
    assert "'a/b' is in a_b-2" in line
    # Whatever rows there are, a label has the same folder.
    copy_by_label(tmp_path / "again", rows[:1], labels=labels)
    assert (tmp_path / "again" / "a_b-2" / "1.jpg").exists()


def test_names_that_differ_in_case_are_not_merged(tmp_path: Path) -> None:
    rows = []
    for number, name in enumerate(["A.jpg", "a.JPG", "a.jpg", "\xe9.jpg", "e\u0301.jpg"]):
        path = tmp_path / "in" / str(number) / name
        path.parent.mkdir(parents=True)
        path.write_bytes(photo(number))
        rows.append(ScoreRow(str(path), "ok", "cat"))
    copy_by_label(tmp_path / "out", rows)
    names = {path.name.casefold() for path in (tmp_path / "out" / "cat").iterdir()}
    assert len(names) == 5


def test_a_place_that_can_not_take_the_copies_is_refused_before_the_work(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "1.jpg").write_bytes(photo(1))
    copies = tmp_path / "copies"
    copies.mkdir()
    (copies / "_errors").write_text("mine")
    assert score(bundle, tmp_path, str(tmp_path / "in"), "--copy-to", str(copies)) == 2
    assert "_errors is no folder" in capsys.readouterr().err
    assert not (tmp_path / "out.csv").exists()
    long = tmp_path.joinpath(*["d" * 200] * 18)
    with pytest.raises(OptionError, match="too long"):
        check_copies(long, ["a"])


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_link_of_another_user_in_place_of_a_label_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "cat").symlink_to(tmp_path / "elsewhere")
    check_copies(tmp_path / "out", ["cat"])
    os.lchown(tmp_path / "out" / "cat", 12345, 12345)
    with pytest.raises(OptionError, match="link of another user"):
        check_copies(tmp_path / "out", ["cat"])
    (tmp_path / "a.jpg").write_bytes(photo(1))
    with pytest.raises(OptionError, match="link of another user"):
        copy_by_label(tmp_path / "out", [ScoreRow(str(tmp_path / "a.jpg"), "ok", "cat")])


def test_links_in_place_of_copies_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "out" / "cat").mkdir(parents=True)
    for name in ("a.jpg", ".a.jpg.partial"):
        (tmp_path / "out" / "cat" / name).symlink_to(tmp_path / "precious")
    (tmp_path / "a.jpg").write_bytes(photo(1))
    copy_by_label(tmp_path / "out", [ScoreRow(str(tmp_path / "a.jpg"), "ok", "cat")])
    assert (tmp_path / "precious").read_text() == "mine"
    assert not (tmp_path / "out" / "cat" / "a.jpg").is_symlink()


def test_root_confines_a_list(bundle: Path, tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "sub", outside):
        folder.mkdir(parents=True)
        (folder / "1.jpg").write_bytes(photo(1))
        with tarfile.open(folder / "a.tar", "w") as file:
            info = tarfile.TarInfo("2.jpg")
            info.size = len(photo(2))
            file.addfile(info, io.BytesIO(photo(2)))
    (root / "out.jpg").symlink_to(outside / "1.jpg")
    (root / "out").symlink_to(outside)
    (root / "in.jpg").symlink_to(root / "sub" / "1.jpg")
    (tmp_path / "root2").mkdir()
    (tmp_path / "root2" / "1.jpg").write_bytes(photo(1))
    (tmp_path / "to-root").symlink_to(root)
    inside = [f"{root}/sub/1.jpg", f"{root}/in.jpg", f"{root}/sub/../sub/1.jpg",
              f"{root}/sub/a.tar::2.jpg", f"file://{root}/sub/1.jpg"]  # fmt: skip
    others = [f"{outside}/1.jpg", f"{root}/out.jpg", f"{root}/out/1.jpg",
              f"{root}/../outside/1.jpg",
              f"{outside}/a.tar::2.jpg", f"{root}/out/a.tar::2.jpg", f"{tmp_path}/root2/1.jpg",
              f"file://{outside}/1.jpg"]  # fmt: skip
    for given in (root, tmp_path / "to-root"):
        reader = sources.Reader(root=given)
        assert all(reader.load(name) for name in inside)
        for name in others:
            with pytest.raises(BrokenImage, match=f"it lies outside of --root {root}"):
                reader.load(name)
        reader.close()
    (tmp_path / "list.txt").write_text("\n".join([*inside, *others]))
    words = str(tmp_path / "list.txt"), "--root", str(root), "--copy-to", str(tmp_path / "copies")
    assert score(bundle, tmp_path, *words) == 0
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [*inside, *others]
    assert [row["status"] for row in rows] == ["ok"] * len(inside) + ["error"] * len(others)
    copies = [path for path in (tmp_path / "copies").rglob("*/*") if path.is_file()]
    assert len(copies) == len(inside)


def test_root_must_be_a_folder(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert score(bundle, tmp_path, str(tmp_path), "--root", str(tmp_path / "none")) == 2
    assert "--root" in capsys.readouterr().err


def test_files_without_an_end_are_read_up_to_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_files, "MAX_FILE", 100)
    assert local_files.read_file("/proc/self/statm")[0]  # states a size of 0
    with pytest.raises(TooLarge):
        local_files.read_file("/proc/self/status")
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", 101)
    with pytest.raises(TooLarge, match="101 bytes"):
        local_files.read_file(str(tmp_path / "sparse"))
