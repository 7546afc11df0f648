"""Layouts of folders are recognised before folders are taken for classes, or refused with a remedy
that works when it is pasted."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

import fledge
from serving.errors import DataError
from tests.support.tiny_bundle import photo
from training.config import load
from training.config.sections import DataConfig
from training.data.dataset import load_dataset
from training.data.folders.part_names import part_of, resembles_part

JPEG = photo(3, (20, 16))


def make(root, *names, data=JPEG):
    """Write photos; `{3}` in a name stands for 0, 1 and 2."""
    for name in names:
        match = re.search(r"\{(\d+)\}", name)
        for i in range(int(match[1]) if match else 1):
            path = root / (name.replace(match[0], str(i)) if match else name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return root


def read(root, **config):
    return load_dataset(str(root), config=DataConfig(**config))


def parts(root, **config):
    """The paths by part and class."""
    found = read(root, **config)
    split = {
        part: sorted((s.path.relative_to(root).as_posix(), found.classes[s.label])
                     for s in getattr(found, part))
        for part in ("train", "valid", "test")
    }  # fmt: skip
    return split, sorted(path.relative_to(root).as_posix() for path in found.unlabelled)


def refused(root, **config):
    with pytest.raises(DataError) as caught:
        read(root, **config)
    message = caught.value.args[0]
    assert "\n" not in message
    return message


def pasted(message):
    """The config that the options in a message give, as a shell and the command read them."""
    words = shlex.split(message.partition(": add ")[2].partition("; ")[0])
    assert words
    return load.read(Path("quick"), words).data


NAMES = [
    *(("train", "train"), ("Train", "train"), ("TRAINING", "train"), ("tr", "train")),
    *(("train_images", "train"), ("TrainingSet", "train"), ("train2017", "train")),
    *(("valid", "valid"), ("val", "valid"), ("validation", "valid"), ("Validation Set", "valid")),
    *(("dev", "valid"), ("eval", "valid"), ("val_images", "valid"), ("val1", "valid")),
    *(("test", "test"), ("test1", "test"), ("Testing", "test"), ("holdout", "test")),
    *(("hold-out", "test"), ("seg_test", "test"), ("Test Data", "test"), ("unlabelled", "test")),
    *(("trains", ""), ("rain", ""), ("brain", ""), ("valve", ""), ("test tube", ""), ("vest", "")),
    *(("cat", ""), ("images", ""), ("", ""), ("1", ""), ("dataset", ""), ("training shoe", "")),
]


@pytest.mark.parametrize(("name", "part"), NAMES)
def test_the_usual_names_of_parts_are_known(name, part):
    assert part_of(name) == part


@pytest.mark.parametrize(
    ("name", "part"),
    [
        *(("trian", "train"), ("vaild", "valid"), ("tset", "test"), ("validaton", "valid")),
        *(("trainning", "train"), ("rain", ""), ("brain", ""), ("tent", ""), ("vest", "")),
        *(("text", ""), ("grain", ""), ("invalid", ""), ("straining", ""), ("rest", "")),
    ],
)
def test_slips_of_the_pen_are_recognised_and_other_words_are_not(name, part):
    assert resembles_part(name) == part


@pytest.mark.parametrize(
    ("train", "valid", "test"),
    [
        ("train", "valid", "test"),
        ("Train", "Valid", "Test"),
        ("TRAIN", "VAL", "TEST"),
        ("training", "validation", "testing"),
        ("train_images", "val_images", "test_images"),
        ("seg_train/seg_train", "seg_val/seg_val", "seg_test/seg_test"),
        ("train/images", "dev/images", "holdout/images"),
        ("images/train", "images/val", "images/test"),
        ("archive/data set/Training", "archive/data set/Validation", "archive/data set/Test1"),
    ],
)
def test_parts_under_usual_names_are_parts(tmp_path, train, valid, test):
    root = make(tmp_path / "d", f"{train}/a/{{3}}.jpg", f"{train}/b/{{3}}.jpg",
                f"{valid}/a/0.jpg", f"{valid}/b/0.jpg", f"{test}/a/0.jpg")  # fmt: skip
    split, unlabelled = parts(root)
    assert split == {
        "train": sorted((f"{train}/{c}/{i}.jpg", c) for c in "ab" for i in range(3)),
        "valid": [(f"{valid}/a/0.jpg", "a"), (f"{valid}/b/0.jpg", "b")],
        "test": [(f"{test}/a/0.jpg", "a")],
    }
    assert unlabelled == []


def test_without_a_validation_part_photos_are_drawn_from_train_and_never_from_test(tmp_path):
    root = make(tmp_path, "train/a/{10}.jpg", "train/b/{10}.jpg", "test/a/{3}.jpg", "test/b/0.jpg")
    split, _ = parts(root)
    assert [len(split[part]) for part in split] == [16, 4, 4]
    assert all(path.startswith("train/") for path, _ in split["train"] + split["valid"])
    assert "validation photos are drawn from those of train (data.valid)" in read(root).reading.line


@pytest.mark.parametrize("test", ["test", "test1", "test/unknown", "Test/images", "seg_pred/x"])
def test_a_flat_test_folder_beside_train_is_unlabelled_and_told(tmp_path, test):
    root = make(tmp_path, "train/a/{5}.jpg", "train/b/{5}.jpg", f"{test}/{{3}}.jpg")
    split, unlabelled = parts(root)
    assert (len(split["train"]), len(split["valid"]), split["test"]) == (8, 2, [])
    assert unlabelled == [f"{test}/{i}.jpg" for i in range(3)]
    assert f"{test.partition('/')[0]}/ with 3 unlabelled photos" in read(root).reading.line


def test_a_flat_test_folder_beside_classes_is_unlabelled_and_told(tmp_path):
    root = make(tmp_path, "a/{5}.jpg", "b/{5}.jpg", "Test1/{3}.jpg")
    split, unlabelled = parts(root)
    assert {label for _, label in split["train"] + split["valid"]} == {"a", "b"}
    assert unlabelled == [f"Test1/{i}.jpg" for i in range(3)]
    assert "Test1/ with 3 unlabelled photos" in read(root).reading.line


@pytest.mark.parametrize(
    ("folders", "says"),
    [
        (["train", "test1"], "test1/ (5 photos), train/ (5 photos)"),
        (["training", "validation"], "names of parts, not of classes"),
        (["Train", "Valid", "Test"], "names of parts, not of classes"),
        (["train", "validation", "extra"], "names of parts, not of classes"),
        (["train"], "names of parts, not of classes"),
        (["trian", "vaild"], "rename trian/ to train/; rename vaild/ to valid/"),
        (["trian/a", "trian/b", "vaild/a", "vaild/b"], "rename trian/ to train/"),
        (["archive/training", "archive/validation"], "archive has training/"),
    ],
)
def test_folders_with_names_of_parts_are_never_classes(tmp_path, folders, says):
    root = make(tmp_path, *(f"{folder}/x-{{5}}.jpg" for folder in folders))
    message = refused(root)
    assert says in message
    if len(folders) > 1 and folders[0].count("/") == 0:  # the remedy for classes of these names
        assert "; or, if they are classes, add data.layout=classes" in message
        assert read(root, layout="classes").classes == tuple(sorted(folders))


@pytest.mark.parametrize("name", ["val", "validation", "training"])
def test_a_flat_part_beside_classes_is_refused(tmp_path, name):
    root = make(tmp_path, "cat/{3}.jpg", "dog/{3}.jpg", f"{name}/{{3}}.jpg")
    assert f"beside them '{name}/'" in refused(root)
    assert "add data.layout=classes" in refused(root)
    assert read(root, layout="classes").classes == ("cat", "dog", name)


@pytest.mark.parametrize("names", [("fold1_train", "fold1_val"), ("my train", "the test")])
def test_names_that_mention_different_parts_are_refused(tmp_path, names):
    root = make(tmp_path, *(f"{name}/{c}/{{3}}.jpg" for name in names for c in "ab"))
    message = refused(root)
    assert f"rename {names[0]}/ to train/" in message
    assert read(root, layout="classes").classes == tuple(sorted(names))


def test_classes_that_mention_one_part_are_classes(tmp_path):
    root = make(tmp_path, "test tube/{3}.jpg", "beaker/{3}.jpg")
    assert read(root).classes == ("beaker", "test tube")


def test_several_sets_side_by_side_are_refused_and_the_told_one_is_read(tmp_path):
    root = make(tmp_path, *(f"{s}/train/{c}/{{3}}.jpg" for s in ("s 1", "s 2") for c in "ab"))
    message = refused(root)
    path = shlex.split(message.partition("--data ")[2].partition(", or,")[0])[0]
    assert load_dataset(path).classes == ("a", "b")


def test_equal_folders_in_each_folder_are_refused_and_each_told_remedy_works(tmp_path):
    root = make(tmp_path, *(f"{s}/{c}/{{3}}.jpg" for s in ("raw", "re sized") for c in "ab"))
    message = refused(root)
    assert "has 'raw/', 're sized/' with the same folders in each ('a/', 'b/')" in message
    assert "add data.layout=inner" in message
    assert "add data.layout=classes" in message
    assert read(root, layout="inner").classes == ("a", "b")
    assert read(root, layout="classes").classes == ("raw", "re sized")
    one = shlex.split(message.partition("--data ")[2].partition(";")[0])[0]
    assert load_dataset(one).classes == ("a", "b")


def test_captions_beside_photos_are_no_boxes(tmp_path):
    root = make(tmp_path, "a/{4}.jpg", "b/{4}.jpg")
    make(root, "a/{4}.txt", "b/{4}.txt", data=b"a photo of a cat, 2 years old")
    assert read(root).classes == ("a", "b")


def test_archives_that_are_not_unpacked_are_told(tmp_path):
    root = make(tmp_path / "my set", "train.zip", "test.zip", data=b"PK")
    message = refused(root)
    assert shlex.split(message.partition("--data ")[2].partition("; ")[0]) == [
        str(root / "train.zip")
    ]


def test_a_stray_photo_beside_the_top_folder_changes_nothing(tmp_path):
    root = make(
        tmp_path, "cover.jpg", *(f"set/{p}/{c}/{{4}}.jpg" for p in ("train", "val") for c in "ab")
    )
    split, _ = parts(root)
    assert (len(split["train"]), len(split["valid"])) == (8, 8)


def test_trains_are_a_class_of_vehicles(tmp_path):
    root = make(tmp_path, "bus/{3}.jpg", "car/{3}.jpg", "train/{3}.jpg")
    assert read(root).classes == ("bus", "car", "train")


@pytest.mark.parametrize("valid", ["valid", "dev"])
def test_parts_inside_the_classes_are_parts(tmp_path, valid):
    root = make(tmp_path, "a/train/{3}.jpg", "b/Train/{3}.jpg", f"a/{valid}/0.jpg",
                f"b/{valid}/0.jpg", "a/test/{2}.jpg", "b/test/deep/0.jpg")  # fmt: skip
    split, _ = parts(root)
    assert split["valid"] == [(f"a/{valid}/0.jpg", "a"), (f"b/{valid}/0.jpg", "b")]
    assert split["test"] == [
        *(("a/test/0.jpg", "a"), ("a/test/1.jpg", "a"), ("b/test/deep/0.jpg", "b"))
    ]
    assert {path.split("/")[1] for path, _ in split["train"]} == {"train", "Train"}


def test_parts_inside_the_classes_without_a_validation_part_never_train_on_test(tmp_path):
    root = make(tmp_path, "a/train/{5}.jpg", "b/train/{5}.jpg", "a/test/{3}.jpg", "b/test/{3}.jpg")
    split, _ = parts(root)
    assert all("/train/" in path for path, _ in split["train"] + split["valid"])
    assert len(split["test"]) == 6


def test_parts_in_some_classes_alone_are_refused(tmp_path):
    root = make(tmp_path, "a/train/{3}.jpg", "a/test/{3}.jpg", "b/{6}.jpg")
    assert "parts in some classes (a/test/, a/train/) and not in b/" in refused(root)
    assert read(root, layout="classes").classes == ("a", "b")
    root = make(tmp_path / "e", "a/val/{3}.jpg", "a/test/{3}.jpg", "b/test/{3}.jpg")
    assert "no train/ in any class" in refused(root)


def test_folders_in_classes_that_are_no_parts_belong_to_the_class(tmp_path):
    root = make(tmp_path, "rail/train/{3}.jpg", "rail/tram/{3}.jpg", "road/{6}.jpg")
    assert read(root).classes == ("rail", "road")


def test_the_top_folder_of_an_archive_is_passed_through_and_told(tmp_path):
    root = make(tmp_path, "flowers-v1/Flowers/rose/{3}.jpg", "flowers-v1/Flowers/tulip/{3}.jpg")
    make(root, "__MACOSX/flowers-v1/._x.jpg", "flowers-v1/README.md", data=b"x")
    found = read(root)
    assert found.classes == ("rose", "tulip")
    assert found.reading.line == "a folder per class, 2 classes, in flowers-v1/Flowers/"


def test_a_yolo_classification_set_is_read(tmp_path):
    root = make(tmp_path, *(f"{p}/{c}/{{3}}.jpg" for p in ("train", "val", "test") for c in "ab"))
    (root / "data.yaml").write_text("names: [a, b]\n")
    assert [len(part) for part in parts(root)[0].values()] == [6, 6, 6]


DETECTION = {
    "yolo": (["images/train/{4}.jpg", "images/val/{4}.jpg"], "labels/train/{4}.txt"),
    "yolo flat": (["images/{4}.jpg"], "labels/{4}.txt"),
    "yolo by part": (["train/images/{4}.jpg", "valid/images/{4}.jpg"], "train/labels/{4}.txt"),
    "voc": (["VOC2012/JPEGImages/{4}.jpg"], "VOC2012/Annotations/{4}.xml"),
    "coco": (["train2017/{4}.jpg", "val2017/{4}.jpg"], "annotations/instances_train2017.json"),
    "coco by part": (["train/{4}.jpg", "valid/{4}.jpg"], "train/_annotations.coco.json"),
    "darknet": (["train/{4}.jpg", "valid/{4}.jpg"], "train/{4}.txt"),
}


BOXES = {
    "txt": b"0 0.5 0.5 0.1 0.1\n",
    "xml": b"<annotation><object><bndbox/></object></annotation>",
    "json": b'{"images": [], "annotations": []}',
}


@pytest.mark.parametrize("kind", DETECTION)
def test_detection_sets_are_refused_by_name(tmp_path, kind):
    photos, boxes = DETECTION[kind]
    root = make(make(tmp_path, *photos), boxes, data=BOXES[boxes.rpartition(".")[2]])
    assert "is a set for detection" in refused(root)


def test_segmentation_sets_are_refused_by_name(tmp_path):
    root = make(tmp_path / "d", "images/{4}.jpg", "masks/{4}.png")
    assert "is a set for segmentation: masks/ has the outlines" in refused(root)
    root = make(tmp_path / "e", "images/a/{4}.jpg", "images/b/{4}.jpg", "masks/a/{4}.png")
    message = refused(root)
    path = shlex.split(message.partition("; use ")[2])[0]
    assert load_dataset(path).classes == ("a", "b")


def test_classes_with_boxes_beside_them_are_classes(tmp_path):
    root = make(tmp_path, "Images/n1-pug/{4}.jpg", "Images/n2-collie/{4}.jpg")
    make(root, "Annotation/n1-pug/{4}.xml", data=b"<a/>")
    assert read(root).classes == ("n1-pug", "n2-collie")


WORDS = {
    "words.txt": "n01440764\ttench, Tinca tinca\nn02012849\tcrane\nn03126707\tcrane\n"
    "n01530575\tbrambling, Fringilla montifringilla\n",
    "synset_words.txt": "n01440764 tench, Tinca tinca\nn02012849 crane\nn03126707 crane\n",
    "LOC_synset_mapping.txt": "n01440764 tench, Tinca tinca\nn02012849 crane\nn03126707 crane\n",
}


@pytest.mark.parametrize("file", WORDS)
@pytest.mark.parametrize("top", ["", "ILSVRC/Data/CLS-LOC/"])
def test_synsets_of_imagenet_get_their_names(tmp_path, file, top):
    ids = ("n01440764", "n02012849", "n03126707")
    root = make(tmp_path, *(f"{top}train/{c}/{{3}}.JPEG" for c in ids))
    make(root, *(f"{top}val/{c}/0.JPEG" for c in ids))
    assert read(root).classes == ids
    (root / file).write_text(WORDS[file])
    found = read(root)
    assert found.classes == ("crane (n02012849)", "crane (n03126707)", "tench")
    assert found.reading.line.endswith(f"; names of the classes from {file}")
    assert read(root, synsets="keep").classes == ids


def test_a_list_that_lacks_a_synset_gives_no_names(tmp_path):
    root = make(tmp_path, "n01440764/{3}.jpg", "n09999999/{3}.jpg")
    (root / "words.txt").write_text(WORDS["words.txt"])
    assert read(root).classes == ("n01440764", "n09999999")


KAGGLE = {
    "dog breeds": ("labels.csv", "id,breed", "train/{8}.jpg", "test/{3}.jpg", ""),
    "paddy": ("train.csv", "image_id,label,variety,age", "train_images/{8}.jpg", "", ".jpg"),
    "plant": ("data/train.csv", "image,labels", "data/train_images/{8}.jpg", "", ".jpg"),
    "flat": ("labels.csv", "file,class", "{8}.png", "", ".png"),
    "semicolons": ("labels.csv", "file;class;more", "{8}.png", "", ".png"),
    "tabs": ("labels.tsv", "file\tclass", "images/{8}.png", "", ".png"),
    "spaces": ("my labels.csv", "file name,the class", "some photos/{8}.png", "", ".png"),
}


@pytest.mark.parametrize("kind", KAGGLE)
def test_the_told_options_read_the_table_of_a_competition(tmp_path, kind):
    table, head, train, test, suffix = KAGGLE[kind]
    root = make(tmp_path, train, *([test] if test else []))
    mark = next(one for one in ",;\t" if one in head)
    more = head.count(mark) - 1
    rows = [f"{i}{suffix}{mark}{'ab'[i % 2]}{f'{mark}x' * more}" for i in range(8)]
    (root / table).write_text("\n".join([head, *rows]) + "\n")
    (root / "sample_submission.csv").write_text("id,a,b\n0,0.5,0.5\n")
    message = refused(root)
    found = load_dataset(str(root), config=pasted(message))
    assert found.classes == ("a", "b")
    assert len(found.train) + len(found.valid) == 8
    assert {int(s.path.stem) % 2 for s in found.train if s.label == 0} == {0}


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["train/cat.{6}.jpg", "train/dog.{6}.jpg", "test1/{4}.jpg"], ("cat", "dog")),
        (["train/cat.{6}.jpg", "train/dog.{6}.jpg"], ("cat", "dog")),
        (["d/train/cat.{6}.jpg", "d/train/dog.{6}.jpg", "d/test1/{4}.jpg"], ("cat", "dog")),
        (["images/great_pyrenees_{6}.jpg", "images/pug_{6}.jpg"], ("great_pyrenees", "pug")),
        (["rose ({6}).jpg", "tulip ({6}).jpg"], ("rose", "tulip")),
    ],
)
def test_the_told_pattern_reads_labels_from_file_names(tmp_path, names, labels):
    root = make(tmp_path, *names)
    message = refused(root)
    found = load_dataset(str(root), config=pasted(message))
    assert found.classes == labels
    assert len(found.train) + len(found.valid) == 12
    assert len(found.unlabelled) == (4 if "test1" in names[-1] else 0)


@pytest.mark.parametrize("name", ["IMG_{9}.jpg", "{9}.jpg", "DSC{9}.jpg"])
def test_names_of_cameras_are_no_labels(tmp_path, name):
    assert "data.pattern=" not in refused(make(tmp_path, name, name.replace("{9}", "1{9}")))


def test_what_belongs_to_no_class_is_counted_and_told(tmp_path):
    root = make(tmp_path, "a/{3}.jpg", "b/{3}.jpg", "stray{2}.jpg", "a/@eaDir/{3}.jpg", "b/noext")
    make(root, "a/0.pgm", "b/notes.txt", data=b"P5 1 1 255 x")
    reading = read(root).reading
    assert reading.passed_over.totals() == {
        "system": 1, "outside-classes": 2, "unsupported-format": 1, "not-an-image": 1,
    }  # fmt: skip
    assert "2 photos outside of the classes" in reading.passed_over.line()
    assert "outside of the classes: 'stray0.jpg', 'stray1.jpg'" in list(reading.lines())
    make(root, "more{3}.jpg")
    line = "outside of the classes: 'more0.jpg', 'more1.jpg', 'more2.jpg' and 2 more"
    assert line in list(read(root).reading.lines())
    assert "1 image of another format (PNM)" in reading.passed_over.line()
    assert len(read(root).train) + len(read(root).valid) == 7


def test_photos_that_a_split_file_or_a_table_does_not_name_are_counted(tmp_path):
    root = make(tmp_path / "d", "a/{4}.jpg", "b/{4}.jpg")
    (tmp_path / "s.csv").write_text("path,fold\na/0.jpg,0\na/1.jpg,1\nb/0.jpg,0\nb/1.jpg,1\n")
    found = load_dataset(str(root), split=tmp_path / "s.csv")
    assert found.reading.passed_over.to_json() == {"outside-classes": {"not in s.csv": 4}}
    (root / "t.csv").write_text("id,label\na/0,x\na/1,y\nb/0,x\nb/1,y\n")
    found = read(root, csv="t.csv", suffix=".jpg")
    counts = found.reading.passed_over.to_json()
    assert counts["outside-classes"] == {"not in t.csv": 4}


def test_links_to_folders_are_followed_and_loops_end(tmp_path):
    make(tmp_path, "elsewhere/more/{4}.jpg")
    root = make(tmp_path / "d", "a/{3}.jpg", "b/{3}.jpg")
    (root / "a/linked").symlink_to(tmp_path / "elsewhere")
    (root / "a/loop").symlink_to(root)
    (root / "c").symlink_to(tmp_path / "elsewhere/more")
    found = read(root)
    assert found.classes == ("a", "b", "c")
    assert len(found.train) + len(found.valid) == 3 + 4 + 3 + 4
    assert found.reading.passed_over.totals() == {"link-loop": 1}


def test_folders_without_photos_are_no_classes_and_unreadable_ones_are_refused(tmp_path):
    root = make(tmp_path, "a/{3}.jpg", "b/{3}.jpg")
    make(root, "code/train.py", "annotations/x.xml", data=b"x")
    found = read(root)
    assert found.classes == ("a", "b")
    assert "2 files that are no images (.py 1, .xml 1)" in found.reading.passed_over.line()
    make(root, "c/{3}.pgm", data=b"P5 1 1 255 x")
    assert "'c' contains no readable photo" in refused(root)
    assert "PNM 3" in refused(root)


def test_preview_draws_the_folders_before_it_reads_photos(tmp_path, capsys):
    root = make(tmp_path / "d", "train/a/{3}.jpg", "train/b/{3}.jpg", "test/{2}.jpg", "x.jpg")
    assert fledge.main(["preview", str(root), "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:8] == [
        "d/  9",
        "├── test  2  unlabelled",
        "└── train  6  train part",
        "    ├── a  3  class",
        "    └── b  3  class",
        "photos: parts train/, with a folder per class in each, and test/ with 2 unlabelled "
        "photos; validation photos are drawn from those of train (data.valid)",
        "passed over: 1 photo outside of the classes",
        lines[7],
    ]


def test_preview_draws_the_folders_of_what_it_refuses(tmp_path, capsys):
    root = make(tmp_path / "d", "train/{3}.jpg", "test1/{2}.jpg")
    assert fledge.main(["preview", str(root), "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out.splitlines() == ["d/  5", "├── test1  2", "└── train  3"]
    assert "names of parts" in err
    assert err.count("\n") == 1


def test_many_folders_are_drawn_in_few_lines(tmp_path):
    root = make(tmp_path, *(f"class{i:03}/{{2}}.jpg" for i in range(40)))
    tree = read(root).reading.tree
    assert len(tree) == 14
    assert tree[-1] == "└── and 28 more folders  56"


def test_deep_folders_are_read(tmp_path):
    make(tmp_path, "a" + "/d" * 400 + "/{3}.jpg", "b/{3}.jpg")
    assert len(read(tmp_path).train) == 4


@pytest.mark.parametrize("names", [("cat", "dog"), ("site A", "site B")])
def test_a_table_with_other_labels_than_the_folders_is_not_ignored(tmp_path, names):
    rows = []
    for folder in names:
        for i in range(6):
            make(tmp_path, f"images/{folder}/{i}.jpg")
            rows.append(f"images/{folder}/{i}.jpg,{'cat' if i % 2 else 'dog'},{i}")
    (tmp_path / "annotations.csv").write_text("file,species,burst\n" + "\n".join(rows) + "\n")
    with pytest.raises(DataError) as caught:
        load_dataset(str(tmp_path))
    message = str(caught.value)
    assert "annotations.csv gives the photos other labels" in message
    assert load_dataset(str(tmp_path), config=pasted(message)).classes == ("cat", "dog")
    by_folder = load_dataset(str(tmp_path), config=DataConfig(layout="classes"))
    assert by_folder.classes == names


def test_a_table_that_agrees_with_the_folders_or_has_no_labels_is_passed_by(tmp_path):
    for folder in ("cat", "dog"):
        make(tmp_path, f"{folder}/{{6}}.jpg")
    names = [f"{folder}/{i}.jpg" for folder in ("cat", "dog") for i in range(6)]
    (tmp_path / "a.csv").write_text("path,label\n" + "".join(f"{n},{n[:3]}\n" for n in names))
    (tmp_path / "b.csv").write_text("path,url\n" + "".join(f"{n},http://{n}\n" for n in names))
    (tmp_path / "c.csv").write_text('path,label\n"broken')
    assert load_dataset(str(tmp_path)).classes == ("cat", "dog")


def test_the_pattern_that_is_told_leaves_the_numbered_test_photos_unlabelled(tmp_path):
    make(tmp_path, "train/cat.{12}.jpg", "train/dog.{12}.jpg", "test1/1.jpg", "test1/12.jpg")
    data = pasted(refused(tmp_path))
    found = load_dataset(str(tmp_path), config=data)
    assert found.classes == ("cat", "dog")
    assert [path.name for path in found.unlabelled] == ["1.jpg", "12.jpg"]


@pytest.mark.parametrize(
    ("others", "name"),
    [(("bn", "hi", "ta"), "te"), (("Benign", "Malignant"), "Pred"), (("as", "ks"), "ts")],
)
def test_a_word_that_may_be_a_class_does_not_become_the_unlabelled_test_part(
    tmp_path, others, name
):
    make(tmp_path, *(f"{other}/{{4}}.jpg" for other in (*others, name)))
    message = refused(tmp_path)
    assert f"beside them '{name}/'" in message
    assert set(read(tmp_path, layout="classes").classes) == {*others, name}


@pytest.mark.parametrize("number", [3, 40])
def test_a_stray_photo_in_a_lower_folder_changes_nothing(tmp_path, number):
    for top in ("set", "more/set/images"):
        root = make(
            tmp_path / top.replace("/", "-"), *(f"{top}/{c}/{{{number}}}.jpg" for c in "abc")
        )
        make(root, f"{top}/cover.jpg")
        found = read(root)
        assert found.classes == ("a", "b", "c")
        assert "1 photo outside of the classes" in " ".join(found.reading.lines())
        make(root, "readme.jpg")
        assert read(root).classes == ("a", "b", "c")


@pytest.mark.parametrize("top", ["train", "train/images"])
def test_a_stray_photo_in_the_folder_of_a_part_changes_nothing(tmp_path, top):
    make(tmp_path, *(f"train/images/{name}/{{6}}.jpg" for name in ("cat", "dog")))
    make(tmp_path, *(f"val/{name}/{{2}}.jpg" for name in ("cat", "dog")), f"{top}/readme.jpg")
    found = read(tmp_path)
    assert (found.classes, len(found.train), len(found.valid)) == (("cat", "dog"), 12, 4)
    assert "1 photo outside of the classes" in " ".join(found.reading.lines())


@pytest.mark.parametrize(
    ("right", "slip", "meant"),
    [
        ("training", "validaton", "validation"),
        ("training", "validatin", "validation"),
        ("validation", "trian2", "train"),
        ("validation", "trainning", "training"),
    ],
)
def test_the_told_command_renames_a_part_with_a_slip_of_the_pen(tmp_path, right, slip, meant):
    root = make(tmp_path / "my set", *(f"{p}/{c}/{{3}}.jpg" for p in (right, slip) for c in "ab"))
    message = refused(root)
    assert f"did you mean {meant}/? rename it: mv " in message
    command = message.partition("rename it: ")[2].partition(", or, if")[0]
    subprocess.run(["sh", "-c", command], check=True)
    assert len(read(root).train) == len(read(root).valid) == 6


@pytest.mark.parametrize("column", ["species", "common_name"])
@pytest.mark.parametrize("place", ["", "camera/", "camera/images/"])
@pytest.mark.parametrize("sites", [("site A", "site B"), ("site A",)])
def test_a_table_of_labels_between_the_data_folder_and_the_photos_is_not_ignored(
    tmp_path, column, place, sites
):
    rows = []
    for site in sites:
        make(tmp_path, f"camera/images/{site}/2024-05-01/RCNX000{{6}}_c0.jpg")
        for i in range(6):
            path = f"camera/images/{site}/2024-05-01/RCNX000{i}_c0.jpg".removeprefix(place)
            rows.append({"file": path, column: "roe deer" if i % 2 else "fox", "burst": i})
    (tmp_path / place / "annotations.jsonl").write_text("\n".join(map(json.dumps, rows)))
    message = refused(tmp_path)
    assert f"data.csv={place}annotations.jsonl" in message
    options = message.partition("add ")[2].partition("; ")[0]
    data = load.read(Path("quick"), shlex.split(options)).data
    assert load_dataset(str(tmp_path), config=data).classes == ("fox", "roe deer")
    if len(sites) > 1:
        assert load_dataset(str(tmp_path), config=DataConfig(layout="classes")).classes == sites


@pytest.mark.parametrize("agrees", [True, False])
def test_columns_that_are_no_labels_do_not_make_a_table_one(tmp_path, agrees):
    names = [f"set/{folder}/{i}.jpg" for folder in ("cat", "dog") for i in range(6)]
    make(tmp_path, *names)
    columns = "path,fold,sharp,view" + ",camera,breed_name" * agrees
    rows = [
        f"{n},{'train' if i % 3 else 'valid'},{'yes' if i % 2 else 'no'},{i}.5"
        + f",{'Leica' if i % 2 else 'Canon'},{n[4:7]}" * agrees
        for i, n in enumerate(names)
    ]
    (tmp_path / "notes.csv").write_text("\n".join([columns, *rows]))
    assert read(tmp_path).classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("hidden", "says"),
    [
        (".bn/{4}.jpg", "1 hidden file or folder (.bn)"),
        ("bn/manifest.json", "1 output of Fledge (bn)"),
        ("@eaDir/bn/{4}.jpg", "1 file or folder of a system or tool (@eaDir)"),
    ],
)
@pytest.mark.parametrize("other", ["hi/{4}.jpg", "notes.doc"])
def test_what_was_passed_over_is_told_where_a_set_is_refused(tmp_path, hidden, says, other):
    make(tmp_path, "bn/{4}.jpg" if "manifest" in hidden else other, other, hidden)
    if "manifest" in hidden:
        keys = dict.fromkeys(("labels", "precisions", "preprocess", "graph"))
        (tmp_path / "bn/manifest.json").write_text(json.dumps(keys))
    assert f"; passed over: {says}" in refused(tmp_path)
