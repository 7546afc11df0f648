"""torchvision datasets: the real torchvision classes on small datasets in the original formats."""

import hashlib
import io
import tarfile
from collections import Counter

import numpy as np
import pytest
from torchvision.datasets import Flowers102, OxfordIIITPet

from serving.errors import DataError, OptionError
from tests.support.tiny_bundle import photo
from training.config.sections import DataConfig
from training.data import torchvision_sets
from training.data.dataset import SPLIT_FILE, load_dataset, read_split, write_split

BREEDS = ("Abyssinian", "american_bulldog", "pug")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fledge"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise OSError("no network in tests")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("torchvision.datasets.utils.urllib.request.urlopen", refuse)


@pytest.fixture
def flowers(cache, monkeypatch):
    """12 photos of the classes 1, 2 and 10, numbered from 1 as the set is."""
    scipy_io = pytest.importorskip("scipy.io")
    folder = cache / "flowers-102"
    (folder / "jpg").mkdir(parents=True)
    labels = np.array([1, 2, 10] * 4)
    for number in range(1, 13):
        (folder / "jpg" / f"image_{number:05d}.jpg").write_bytes(photo(number, (20, 16)))
    scipy_io.savemat(folder / "imagelabels.mat", {"labels": labels[None]})
    ids = {"trnid": [[1, 2, 3]], "valid": [[6, 5, 4]], "tstid": [[7, 8, 9, 10, 11, 12]]}
    scipy_io.savemat(folder / "setid.mat", ids)
    sums = {
        key: (name, hashlib.md5((folder / name).read_bytes()).hexdigest())
        for key, name in (("label", "imagelabels.mat"), ("setid", "setid.mat"))
    }
    monkeypatch.setattr(Flowers102, "_file_dict", {**Flowers102._file_dict, **sums})
    return folder


def pet_lists():
    rows = [(f"{breed}_{i}", c + 1, i) for c, breed in enumerate(BREEDS) for i in range(1, 9)]
    line = "{} {} 1 1\n".format
    return {
        "trainval.txt": "".join(line(name, label) for name, label, i in rows if i <= 5),
        "test.txt": "".join(line(name, label) for name, label, i in rows if i > 5),
    }


@pytest.fixture
def pets(cache):
    folder = cache / "oxford-iiit-pet"
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    for name, text in pet_lists().items():
        (folder / "annotations" / name).write_text(text)
    for breed in BREEDS:
        for i in range(1, 9):
            (folder / "images" / f"{breed}_{i}.jpg").write_bytes(photo(i, (20, 16)))
    return folder


def test_flowers102_comes_with_its_parts(flowers):
    found = load_dataset("flowers102")
    assert [s.path.name for s in found.train] == [f"image_{i:05d}.jpg" for i in (1, 2, 3)]
    assert [s.path.name for s in found.valid] == [f"image_{i:05d}.jpg" for i in (6, 5, 4)]
    assert len(found.test) == 6
    names = [Flowers102.classes[i] for i in (0, 1, 9)]
    assert set(found.classes) == set(names)
    for path, label in (*found.train, *found.valid, *found.test):
        number = int(path.stem[-5:])
        assert found.classes[label] == names[(number - 1) % 3]
    assert found.root == flowers
    assert len(set(Flowers102.classes)) == 102


def test_an_older_torchvision_has_numbers_for_flowers(flowers, monkeypatch):
    monkeypatch.delattr(Flowers102, "classes")
    assert load_dataset("flowers102").classes == ("1", "2", "10")


def test_the_pets_have_an_official_test_part_and_a_drawn_valid_part(pets):
    found = load_dataset("oxford-iiit-pet", config=DataConfig(valid=0.4), seed=73)
    assert found.classes == ("Abyssinian", "American Bulldog", "Pug")
    assert Counter(s.label for s in found.train) == {0: 3, 1: 3, 2: 3}
    assert Counter(s.label for s in found.valid) == {0: 2, 1: 2, 2: 2}
    assert {s.path.stem[-1] for s in found.test} == {"6", "7", "8"}
    for path, label in (*found.train, *found.valid, *found.test):
        assert path.stem.startswith(BREEDS[label])
    folds = [
        load_dataset("oxford-iiit-pet", config=DataConfig(folds=5, fold=i)).valid for i in range(5)
    ]
    assert sorted(s for fold in folds for s in fold) == sorted(found.train + found.valid)


def test_a_split_file_replaces_the_official_split(pets, tmp_path):
    rows = [f"images/{breed}_{i}.jpg,{i % 2}" for breed in BREEDS for i in (1, 2, 7, 8)]
    (tmp_path / "s.csv").write_text("\n".join(["path,fold", *rows]))
    found = load_dataset("oxford-iiit-pet", split=tmp_path / "s.csv", config=DataConfig(fold=1))
    assert {s.path.stem[-1] for s in found.valid} == {"1", "7"}
    assert found.test == ()


def test_the_split_of_a_run_is_read_back(pets, tmp_path):
    found = load_dataset("oxford-iiit-pet")
    write_split(found, tmp_path / SPLIT_FILE)
    again = read_split(tmp_path / SPLIT_FILE, found.root, found.classes, "oxford-iiit-pet")
    assert again == found


def test_a_missing_set_is_downloaded_by_torchvision(cache, monkeypatch):
    """The download code is torchvision's; local archives replace the network."""
    images = {
        f"images/{breed}_{i}.jpg": photo(i, (20, 16)) for breed in BREEDS for i in range(1, 9)
    }
    lists = {f"annotations/{name}": text.encode() for name, text in pet_lists().items()}
    archives = {"images.tar.gz": images, "annotations.tar.gz": lists}
    downloads = []

    def fetch(url, path, **_):
        downloads.append(url)
        with tarfile.open(path, "w:gz") as archive:
            for name, content in archives[url.rpartition("/")[2]].items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", fetch)
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, **_: url)
    no_sums = tuple((url, None) for url, _ in OxfordIIITPet._RESOURCES)
    monkeypatch.setattr(OxfordIIITPet, "_RESOURCES", no_sums)
    if hasattr(tarfile, "data_filter"):  # torchvision sets no filter, and Python warns
        data_filter = staticmethod(tarfile.data_filter)
        monkeypatch.setattr(tarfile.TarFile, "extraction_filter", data_filter, raising=False)
    assert len(load_dataset("oxford-iiit-pet").test) == 9
    assert len(downloads) == 2
    assert len(load_dataset("oxford-iiit-pet").test) == 9
    assert len(downloads) == 2  # downloaded once


@pytest.mark.parametrize("name", torchvision_sets.NAMES)
def test_without_network_the_error_names_set_folder_and_remedy(name, cache):
    with pytest.raises(DataError, match="no network in tests") as caught:
        load_dataset(name)
    message = str(caught.value)
    assert name in message
    assert str(cache) in message
    assert "put torchvision's copy there" in message
    assert "\n" not in message


def test_damaged_copies_are_named(flowers, pets):
    (pets / "images" / "pug_3.jpg").unlink()
    with pytest.raises(
        DataError, match=r"1 of 24 photos are missing, for example .*pug_3\.jpg; remove"
    ):
        load_dataset("oxford-iiit-pet")
    (pets / "annotations" / "test.txt").write_text("half a li")
    with pytest.raises(DataError, match="damaged"):
        load_dataset("oxford-iiit-pet")
    (flowers / "setid.mat").write_bytes(b"other bytes")  # wrong md5: torchvision downloads again
    with pytest.raises(DataError, match=r"flowers102.*no network in tests"):
        load_dataset("flowers102")


def test_label_options_are_refused_for_a_set_with_labels(pets):
    with pytest.raises(OptionError, match="labels of its own"):
        load_dataset("oxford-iiit-pet", config=DataConfig(pattern="(.*)"))
