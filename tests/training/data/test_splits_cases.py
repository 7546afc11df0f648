"""Cases of drawn splits and split files: which seed, which fold, and the text of every refusal."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from serving.errors import DataError, OptionError
from training.config.sections import DataConfig
from training.data.layouts import Photo
from training.data.splits import (
    draw_split,
    read_split_file,
    stratified_folds,
    stratified_holdout,
)

ROOT = Path("/photos")
CLASSES = "aaaaabbbbab"


def drawn(seed: int = 0, labels: str = CLASSES, **options: float) -> str:
    """The part of each photo, by its first letter; a photo with a capital label has one already."""
    photos = [
        Photo(ROOT / f"{number:02}.jpg", label, "test" if label.isupper() else "")
        for number, label in enumerate(labels)
    ]
    split = draw_split(ROOT, photos, DataConfig(**options), seed)
    return "".join(part[0] for _, _, part in sorted(split))


def folds(seed: int, k: int) -> str:
    return "".join(map(str, stratified_folds(list(CLASSES), k, seed)))


def test_a_seed_draws_the_same_split_in_every_version() -> None:
    """A repeated run, and one on another machine, validates on the same photos."""
    assert stratified_holdout(list(CLASSES), 0.4, 7) == [held == "1" for held in "10010010001"]
    assert folds(7, 3) == "00211100221"


def test_splits_are_drawn_with_the_options_and_the_seed() -> None:
    for seed in (3, 5):
        held = stratified_holdout(list(CLASSES), 0.4, seed)
        assert drawn(seed, valid=0.4) == "".join("v" if out else "t" for out in held)
        for fold in (0, 2):
            expected = "".join("v" if own == str(fold) else "t" for own in folds(seed, 3))
            assert drawn(seed, folds=3, fold=fold) == expected
    assert drawn(3, valid=0.4) != drawn(5, valid=0.4)
    assert drawn(3, folds=3) != drawn(5, folds=3)


def test_photos_with_a_part_keep_it_and_do_not_count() -> None:
    alone = iter(drawn(1, labels="aaabbb"))
    expected = "".join("t" if label.isupper() else next(alone) for label in "aaAaBbCbb")
    assert drawn(1, labels="aaAaBbCbb") == expected
    assert drawn(1, labels="AAB") == "ttt"


@pytest.mark.parametrize(
    ("labels", "options", "kind", "message"),
    [
        (
            "AB",
            {"folds": 3, "fold": 1},
            OptionError,
            "data.folds = 3: /photos is split already; remove the option",
        ),
        (
            "aabb",
            {"fold": 1},
            OptionError,
            "data.fold = 1 has no effect alone; set data.folds, or give --split",
        ),
        (
            "aabccd",
            {},
            DataError,
            "class 'b' has one photo; it needs at least 2, one to train on and one to validate on",
        ),
    ],
)
def test_a_split_that_can_not_be_drawn(
    labels: str, options: dict[str, float], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind) as refused:
        drawn(labels=labels, **options)
    assert str(refused.value) == message


# ---- split files


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., list[Photo]]:
    root = tmp_path / "data"
    for name in ("a/0.jpg", "a/1.jpg", "b/0.jpg", "top.jpg", os.fsdecode(b"b/\xff.jpg")):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def read(text: str | bytes, *, class_folders: bool = True, **options: int) -> list[Photo]:
        split = tmp_path / "s.csv"
        split.write_bytes(text if isinstance(text, bytes) else text.encode())
        photos = read_split_file(
            root, split, DataConfig(**options), lambda path: path[0], class_folders=class_folders
        )
        return [photo._replace(path=photo.path.relative_to(root)) for photo in photos]

    return read


def test_a_split_file_is_read_in_order(read: Callable[..., list[Photo]]) -> None:
    text = b'\xef\xbb\xbffold , note, path\r\n train,x, a/0.jpg \r\n7,,b/0.jpg\r\n0,,"a/1.jpg"\r\n'
    text += b"test,,b/\xff.jpg\r\n"
    expected = [
        Photo(Path("a/0.jpg"), "a", "train"),
        Photo(Path("b/0.jpg"), "b", "train"),
        Photo(Path("a/1.jpg"), "a", "valid"),
        Photo(Path(os.fsdecode(b"b/\xff.jpg")), "b", "test"),
    ]
    assert read(text) == expected
    swapped = {"b/0.jpg": "valid", "a/1.jpg": "train"}
    assert read(text, fold=7) == [
        photo._replace(part=swapped.get(str(photo.path), photo.part)) for photo in expected
    ]
    assert read("path,fold\ntop.jpg,valid\n", class_folders=False)[0].label == "t"
    assert read(f"path,fold\na/0.jpg,{'0' * 9}\n")[0].part == "valid"


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "s.csv: the first line must be 'path,fold'; it has nothing"),
        ("path, x\n", {}, "s.csv: the first line must be 'path,fold'; it has 'path', 'x'"),
        (
            "path,fold\na/0.jpg\n",
            {},
            "s.csv, line 2: fold '' is not train, valid, test or a number",
        ),
        (
            "path,fold\n\na/0.jpg,1234567890\n",
            {},
            "s.csv, line 3: fold '1234567890' is not train, valid, test or a number",
        ),
        (
            "path,fold\na/0.jpg,-1\n",
            {},
            "s.csv, line 2: fold '-1' is not train, valid, test or a number",
        ),
        (
            "path,fold\ntop.jpg,0\n",
            {},
            "s.csv, line 2: path 'top.jpg' is not CLASS/photo below the data folder",
        ),
        (
            "path,fold\na/../top.jpg,0\n",
            {},
            "s.csv, line 2: path 'a/../top.jpg' is not CLASS/photo below the data folder",
        ),
        (
            "fold,path\n0,\n",
            {"class_folders": False},
            "s.csv, line 2: path '' is not a photo in the data folder",
        ),
        (
            "path,fold\n" + "top.jpg,train\n" * 21,
            {},
            "s.csv has 21 mistakes:"
            + "".join(
                f"\n  line {number}: path 'top.jpg' is not CLASS/photo below the data folder"
                for number in range(2, 22)
            )
            + "\n  and 1 more",
        ),
        (
            "path,fold\na/0.jpg,0\na//0.jpg,1\n",
            {},
            "s.csv, line 3: 'a//0.jpg' is in line 2, too; a photo belongs to one part",
        ),
        (
            "path,fold\na/8.jpg,0\na/0.jpg,part\na/1.jpg,0\na/9.jpg,0\n",
            {},
            "s.csv has 3 mistakes:\n  line 2: no photo 'a/8.jpg'\n"
            "  line 3: fold 'part' is not train, valid, test or a number\n"
            "  line 5: no photo 'a/9.jpg'\n  photos are looked for below data",
        ),
        ("path,fold\na/0.jpg,2\na/1.jpg,1\n", {}, "data.fold = 0: s.csv has folds 1, 2"),
        ("path,fold\na/0.jpg,train\n", {"fold": 1}, "data.fold = 1: s.csv has no numbers"),
        (
            "path,fold\na/0.jpg,0\n",
            {"folds": 2},
            "data.folds = 2: s.csv defines the split; use only one of them",
        ),
    ],
)
def test_an_invalid_split_file_is_refused(
    read: Callable[..., list[Photo]],
    tmp_path: Path,
    text: str,
    options: dict[str, int],
    message: str,
) -> None:
    with pytest.raises((DataError, OptionError)) as refused:
        read(text, **options)
    assert str(refused.value).replace(f"{tmp_path}/", "") == message
    assert isinstance(refused.value, OptionError) == message.startswith("data.")


def test_listed_photos_have_labels(tmp_path: Path) -> None:
    split = tmp_path / "s.csv"
    split.write_text("path,fold\na.jpg,0\nb.jpg,0\nc.jpg,0\n")
    for name in "abc":
        (tmp_path / f"{name}.jpg").touch()

    def read(label_of: Callable[[str], str]) -> list[Photo]:
        return read_split_file(tmp_path, split, DataConfig(), label_of, class_folders=False)

    with pytest.raises(DataError) as refused:
        read(lambda path: "a" if path == "a.jpg" else "")
    assert str(refused.value) == (
        f"{split} has 2 mistakes:\n  line 3: 'b.jpg' has no label\n  line 4: 'c.jpg' has no label"
    )


def test_a_split_file_that_can_not_be_read(tmp_path: Path) -> None:
    for split, reason in (
        (tmp_path / "none.csv", ": no such file; make a CSV 'path,fold'"),
        (tmp_path, ": a folder, not a CSV 'path,fold'"),
        (Path("/dev/null/x"), " can't be read: Not a directory"),
    ):
        with pytest.raises(DataError) as refused:
            read_split_file(tmp_path, split, DataConfig(), str, class_folders=True)
        assert str(refused.value) == f"--split {split}{reason}"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("path;fold\r\na/0.jpg;Train\r\nb/0.jpg;VAL\r\n", "train valid"),
        ("path, fold\na/0.jpg, train\nb/0.jpg, valid\n", "train valid"),
        ("a/0.jpg\ttrain\nb/0.jpg\ttest\n", "train test"),
        ('{"path": "a/0.jpg", "fold": 1}\n{"path": "b/0.jpg", "fold": 0}\n', "train valid"),
        ("filename,split\na\\0.jpg,1.0\nb\\0.jpg,0.0\n", "train valid"),
        ("image,part\n/mnt/other/data/a/0.jpg,1\n/mnt/other/data/b/0.jpg,0\n", "train valid"),
        ("image,part\nC:\\Users\\me\\a\\0.jpg,1\nC:\\Users\\me\\b\\0.jpg,0\n", "train valid"),
        ("\ufeffpath,fold\na/0,train\nb/0,valid\n", "train valid"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_split_file_may_come_from_any_program(
    tmp_path: Path, text: str, parts: str, encoding: str
) -> None:
    for name in ("a/0.jpg", "b/0.jpg"):
        (tmp_path / "data" / name).parent.mkdir(parents=True)
        (tmp_path / "data" / name).touch()
    split = tmp_path / ("s.jsonl" if text.startswith("{") else "s.csv")
    split.write_bytes(text.encode(encoding))
    photos = read_split_file(
        tmp_path / "data", split, DataConfig(), lambda path: path[0], class_folders=True
    )
    assert [photo.path.relative_to(tmp_path / "data").as_posix() for photo in photos] == [
        *("a/0.jpg", "b/0.jpg")
    ]
    assert " ".join(photo.part for photo in photos) == parts
