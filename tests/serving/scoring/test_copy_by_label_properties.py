"""Laws of the copies by label, for any names of images and labels."""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st

from serving.inputs import archives
from serving.inputs.file_kinds import MARK
from serving.scoring.copy_by_label import copy_by_label
from serving.scoring.rows import ScoreRow
from tests.support.hypothesis_profiles import examples
from tests.support.odd_names import file_names, texts

LABELS = (
    st.sampled_from(["a", "..", ".", "/", "../../x", "a/b", "C:\\x", "_errors", "é" * 200, " "])
    | texts(min_size=1)
    | st.none()
)
PHOTOS = st.lists(
    st.tuples(file_names() | st.integers(230, 251).map("n".__mul__), LABELS), max_size=6
)


def row(path: str, label: str | None) -> ScoreRow:
    return ScoreRow(path, "error" if label is None else "ok", label)


def content(number: int) -> bytes:
    """The first bytes of a photo, and a number."""
    return b"\xff\xd8\xff%d" % number


def files_below(folder: Path) -> dict[Path, bytes]:
    """The files except the mark."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != MARK)
    return {path: path.read_bytes() for path in files}


@given(PHOTOS)
@examples(30)
def test_each_photo_is_copied_once_into_a_folder_of_its_label(photos) -> None:
    with tempfile.TemporaryDirectory() as name:
        source, target = Path(name, "in"), Path(name, "out")
        rows = []
        for number, (photo, label) in enumerate(photos):
            path = source / str(number) / f"{photo}.jpg"
            path.parent.mkdir(parents=True)
            path.write_bytes(content(number))
            rows.append(row(str(path), label))
        line = copy_by_label(target, rows)
        assert f"{line};".startswith(f"copied {len(rows)} images to {target};")
        copies = files_below(target)
        assert sorted(copies.values()) == sorted(map(content, range(len(rows))))
        assert {path.parent.parent for path in copies} <= {target}
        labels = {label for _, label in photos}
        assert len({path.parent for path in copies}) == len(labels)  # none is merged
        assert len({str(path).casefold() for path in copies}) == len(copies)
        assert files_below(Path(name)).keys() == files_below(source).keys() | copies.keys()
        copy_by_label(target, rows)
        assert files_below(target) == copies


@given(
    st.lists(
        st.tuples(texts(max_size=5) | st.sampled_from([".", "..", "../..", "n" * 300]), LABELS),
        max_size=5,
    ),
)
@example([("n" * 300, "a"), ("a\0b", None), ("..", "é" * 200), ("n" * 300, "a")])
@examples(40)
def test_members_of_an_archive_are_copied_into_the_folder(members) -> None:
    with tempfile.TemporaryDirectory() as name:
        path, target = Path(name, "x.tar"), Path(name, "out")
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as file:
            for number, (member, _) in enumerate(members):
                info = tarfile.TarInfo(f"a/{member}.jpg")
                info.size = len(content(number))
                file.addfile(info, io.BytesIO(content(number)))
        listed = list(archives.names(str(path), lambda line: None))
        rows = [row(one, label) for one, (_, label) in zip(listed, members, strict=False)]
        copy_by_label(target, rows)
        copies = files_below(target)
        assert len(copies) == len(rows)
        assert {copy.parent.parent for copy in copies} <= {target}
        assert files_below(Path(name)).keys() == copies.keys() | {path}


@given(
    st.lists(texts() | st.sampled_from(["..", ".", "/", "", "a/..", "x::..", "\0"])),
    LABELS,
)
@examples(60)
def test_names_that_are_no_files_are_counted(names, label) -> None:
    with tempfile.TemporaryDirectory() as folder:
        before = os.getcwd()
        os.chdir(folder)
        try:
            line = copy_by_label(Path(folder, "out"), [row(name, label) for name in names])
        finally:
            os.chdir(before)
        assert line.startswith("copied 0 images")
        assert (f"{len(names)} could not be read" in line) == bool(names)
        assert files_below(Path(folder)) == {}
