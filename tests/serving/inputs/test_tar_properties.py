"""Laws of tar archives: each listed name loads the bytes of its own member."""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
from contextlib import closing, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import FledgeError
from serving.inputs import archives, sources
from serving.inputs.sources import Reader
from tests.support.hypothesis_profiles import examples
from tests.support.odd_names import texts

PARTS = st.sampled_from(["a", "b", "..", ".", "", "2::a", "::", "c.tar", ".x", "C:", "\\"]) | texts(
    max_size=4
)
# A repeated name gets a number, `2::a.jpg`, and a member may have that name itself.
MEMBERS = st.builds(
    lambda parts, name, suffix: "/".join([*parts, f"{name}{suffix}"]),
    st.lists(PARTS, max_size=3),
    st.sampled_from(["a", "2::a", "3::a", "a.tar::b"]) | texts(max_size=4),
    st.sampled_from([".jpg", ".PNG", ".webp", ".txt", ""]),
)
FORMATS = st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])


def write(path: Path, names: list[str], form: int) -> None:
    """Write an archive whose members contain their numbers."""
    mode = "w:gz" if path.suffix == ".gz" else "w"
    with tarfile.open(path, mode, format=form, encoding="utf-8", errors="surrogateescape") as file:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = len(str(number))
            file.addfile(info, io.BytesIO(str(number).encode()))


@given(
    st.lists(MEMBERS, max_size=8),
    FORMATS,
    st.sampled_from(["x.tar", "x.tar.gz", "x.tar::y.tar"]),
    st.randoms(use_true_random=False),
)
@examples(40)
def test_each_listed_name_loads_its_own_member(names, form, archive, random) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, archive)
        write(path, names, form)
        notes: list[str] = []
        listed = list(archives.names(str(path), notes.append))
        assert notes == []
        assert len(set(listed)) == len(listed)
        order = list(enumerate(listed))
        random.shuffle(order)
        reader = Reader()
        loaded = {place: reader.load(name) for place, name in order}
        reader.close()
        numbers = [int(loaded[place]) for place in range(len(listed))]
    assert numbers == sorted(numbers)  # the order of the archive
    # Exactly the images are listed that are not hidden.
    with tarfile.open(fileobj=in_memory(names, form)) as file:
        shown = [info.name for info in file]
    assert numbers == [place for place, name in enumerate(shown) if is_listed(name)]


def in_memory(names: list[str], form: int) -> io.BytesIO:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder, "x.tar"), names, form)
        return io.BytesIO(Path(folder, "x.tar").read_bytes())


def is_listed(name: str) -> bool:
    suffix = os.path.splitext(name)[1].lower()
    hidden = any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))
    return suffix in (".jpg", ".png", ".webp") and not hidden


@given(st.lists(MEMBERS, max_size=4), MEMBERS, st.sampled_from(["", "/", "../", "::", "2::"]))
@examples(60)
def test_no_name_reads_a_file_beside_the_archive(names, member, before) -> None:
    """Names that look like paths out of the archive are members or nothing."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.tar")
        write(path, names, tarfile.PAX_FORMAT)
        Path(folder, "a.jpg").write_bytes(b"secret")
        reader = Reader()
        name = f"{path}{archives.SEPARATOR}{before}{member}"
        if os.path.lexists(name.partition("\0")[0]):
            return
        with closing(reader), suppress(FledgeError):
            assert reader.load(name) != b"secret"


@given(st.binary(max_size=64), st.sampled_from([".tar", ".tgz", ".tar.xz"]))
@examples(60)
def test_bytes_that_are_no_archive_are_noted_and_list_nothing(data, suffix) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"x{suffix}")
        path.write_bytes(data)
        notes: list[str] = []
        assert list(archives.names(str(path), notes.append)) == []
        with pytest.raises(FledgeError):
            next(sources.find([str(path)]))
