"""Training, preview and scoring agree on which files are photos, and of which class each is."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import DataError
from serving.evaluation.true_labels import FolderLabels
from serving.inputs import sources
from serving.inputs.passed_over import PassedOver, Reason
from tests.support.hypothesis_profiles import examples
from tests.support.odd_names import file_names
from tests.support.tiny_bundle import photo
from tests.training.data.test_layouts import BREEDS, PETS, breeds, pets
from tests.training.data.test_structure import DETECTION, KAGGLE, make
from training.config.sections import DataConfig
from training.data.dataset import Dataset, load_dataset
from training.data.sample import write_sample
from training.preview import scan

JPEG = photo(5, (12, 10))
LAYOUTS: dict[str, Callable[[str, str], str]] = {
    "classes": lambda label, part: label,
    "parts": lambda label, part: f"{part}/{label}",
    "other names": lambda label, part: f"{part.upper()}_images/{label}",
    "inside out": lambda label, part: f"{label}/{part}",
}
PARTS = ("train", "valid", "test")
NOISE = (
    *("@eaDir/x.jpg/THUMB.jpg", ".git/x.jpg", ".hidden.jpg", "Thumbs.db", "._x.jpg", "notes.txt"),
    *("x.nef", "x.jpg.bak", "README", "node_modules/x.png", "empty-file"),
)

# A name that ends in ~ is that of a backup.
_NAMES = st.tuples(
    file_names(4), st.sampled_from([".jpg", ".JPEG", ".png", "", ".dat", ".1"])
).filter(lambda named: not "".join(named).endswith("~"))
_PLACES = st.sampled_from(["", "7/", "7/8/", "10/", "9/"])


@st.composite
def trees(draw: st.DrawFn) -> tuple[dict[str, str], list[str], list[str]]:
    """Paths of labelled photos with their labels; of photos of no class; of other files."""
    place = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))]
    top = draw(st.sampled_from(["", "archive/", "archive/the set/"]))
    photos: dict[str, str] = {}
    for label in ("ant", "bee", "cow"):
        for part in PARTS:
            for _ in range(draw(st.integers(1, 3))):
                name, suffix = draw(_NAMES)
                path = f"{top}{place(label, part)}/{draw(_PLACES)}x{name}{suffix}"
                photos[path] = label
    strays = draw(st.lists(st.sampled_from(["s1.jpg", "s2.png"]), unique=True)) if top == "" else []
    folders = sorted({os.path.dirname(path) for path in photos})
    noise = draw(st.lists(st.tuples(st.sampled_from(folders), st.sampled_from(NOISE)), max_size=6))
    return photos, strays, [f"{folder}/{name}" for folder, name in noise]


def write(root: Path, paths: list[str], data: bytes) -> None:
    for path in paths:
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)


def scored(root: Path) -> tuple[set[str], PassedOver]:
    passed = PassedOver()
    start = os.path.join(root, "")
    return {name.removeprefix(start) for name in sources.find([str(root)], passed_over=passed)}, (
        passed
    )


def check_agreement(dataset: Dataset, root: Path) -> dict[str, str]:
    """Check that scoring and preview have the photos of training; return label by path."""
    start = os.path.join(root, "")
    names, passed = scored(root)
    samples = [*dataset.train, *dataset.valid, *dataset.test]
    labels = {str(s.path).removeprefix(start): dataset.classes[s.label] for s in samples}
    assert len(labels) == len(samples)
    unlabelled = {str(path).removeprefix(start) for path in dataset.unlabelled}
    told = dataset.reading.passed_over.totals()
    outside = told.pop(Reason.OUTSIDE_CLASSES, 0)
    assert told == passed.totals()
    assert not unlabelled & labels.keys()
    assert labels.keys() | unlabelled <= names
    assert len(names) == len(labels) + len(unlabelled) + outside
    shown = re.match(r".*  ([0-9,]+)", dataset.reading.tree[0])
    assert shown is not None
    assert int(shown[1].replace(",", "")) == len(names)
    looked_at = scan.scan_photos(dataset)
    assert {str(one.path).removeprefix(start): one.label for one in looked_at} == labels | (
        dict.fromkeys(unlabelled, "")
    )
    return labels


@given(trees())
@examples(25)
def test_all_commands_agree_on_generated_trees(tree: tuple[dict[str, str], list[str], list[str]]):
    photos, strays, noise = tree
    with tempfile.TemporaryDirectory() as name:
        root = Path(name).resolve() / "d"
        try:
            write(root, [*photos, *strays], JPEG)
        except OSError:
            return  # a photo has the name of a folder
        write(root, noise, b"")
        dataset = load_dataset(str(root), trainable=False)
        assert check_agreement(dataset, root) == photos
        assert dataset.reading.passed_over.totals().get(Reason.OUTSIDE_CLASSES, 0) == len(strays)
        folders = FolderLabels()
        for path in photos:
            folders.register(path)
        folders.set_classes(dataset.classes)
        assert {path: folders.label_of(path) for path in photos} == photos


SETS: dict[str, tuple[Callable[[Path], object], DataConfig]] = {
    "sample": (lambda root: write_sample(root, per_class=2), DataConfig()),
    "breeds": (breeds, BREEDS),
    "breeds in pictures": (
        lambda root: breeds(root, train="pictures/all/"),
        BREEDS.model_copy(update={"images": "pictures/all"}),
    ),
    "pets": (pets, DataConfig(pattern=PETS)),
    "pets in images": (
        lambda root: pets(root, "images/"),
        DataConfig(pattern=PETS, images="images"),
    ),
    "parts": (
        lambda root: make(root, "train/a/{3}.jpg", "train/b/{3}.jpg", "val/a/{2}.jpg",
                          "test1/{3}.jpg", "stray.jpg", "train/stray.jpg", "b.txt"),
        DataConfig(),
    ),
    "inside out": (
        lambda root: make(root, *(f"{c}/{p}/{{2}}.jpg" for c in "ab" for p in ("train", "test"))),
        DataConfig(),
    ),
    "imagenet": (
        lambda root: make(root, "ILSVRC/Data/train/n01440764/{3}.jpg",
                          "ILSVRC/Data/train/n02012849/{3}.jpg", "ILSVRC/Data/test/{3}.jpg"),
        DataConfig(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_all_commands_agree_on_the_sets_of_the_tests(tmp_path: Path, name: str) -> None:
    build, config = SETS[name]
    root = tmp_path.resolve() / "d"
    build(root)
    assert check_agreement(load_dataset(str(root), config=config, trainable=False), root)


@pytest.mark.parametrize("name", [*DETECTION, *KAGGLE])
def test_scoring_finds_the_photos_of_sets_that_training_refuses(tmp_path: Path, name: str) -> None:
    if name in DETECTION:
        photos, _ = DETECTION[name]
    else:
        _, _, *parts, _ = KAGGLE[name]
        photos = [part for part in parts if part]
    root = make(tmp_path.resolve(), *photos)
    with pytest.raises(DataError):
        load_dataset(str(root))
    names, _ = scored(root)
    assert len(names) == sum(int(found) for one in photos for found in re.findall(r"{(\d)}", one))
