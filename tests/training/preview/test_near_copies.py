import numpy as np
import pytest
from PIL import Image

from training.preview import near_copies, scan


def frame(path, seed, shift=0, part="train"):
    """A frame of the video `seed`: a smooth picture, moved by `shift` pixels."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
    large = small.resize((160, 120), Image.Resampling.BICUBIC)
    path.parent.mkdir(parents=True, exist_ok=True)
    large.crop((shift, 0, 150 + shift, 120)).save(path)
    return scan.photo_stats(path, part, "a")


def test_frames_of_a_video_in_both_parts_are_found_and_other_photos_are_not(tmp_path):
    training = [frame(tmp_path / f"{video}" / "0.png", video) for video in range(40)]
    copies = [frame(tmp_path / f"{video}" / "1.png", video, 1, "valid") for video in range(5)]
    others = [frame(tmp_path / f"{n}" / "1.png", n, 0, "valid") for n in range(100, 130)]
    found = near_copies.near_copies([*copies, *others], training)
    assert [(one.path, other.path) for one, other in found] == [
        (tmp_path / f"{video}" / "1.png", tmp_path / f"{video}" / "0.png") for video in range(5)
    ]


def test_exact_duplicates_have_a_hint_of_their_own(tmp_path):
    training = [frame(tmp_path / "a.png", 1)]
    assert near_copies.near_copies([frame(tmp_path / "b.png", 1, part="valid")], training) == []


def test_pale_photos_that_differ_are_no_copies(tmp_path):
    training, valid = [], []
    for n in range(8):
        pixels = np.full((64, 64, 3), 250, np.uint8)
        pixels[8 * n : 8 * n + 8, 8 * n : 8 * n + 8] = 200
        Image.fromarray(pixels).save(tmp_path / f"{n}.png")
        part = "valid" if n % 2 else "train"
        (valid if n % 2 else training).append(scan.photo_stats(tmp_path / f"{n}.png", part, "a"))
    assert near_copies.near_copies(valid, training) == []


@pytest.mark.parametrize(("part", "name"), [("valid", "validation"), ("test", "test")])
def test_the_hint_names_a_pair_and_the_remedy(tmp_path, part, name):
    training = [frame(tmp_path / f"{video}.png", video) for video in range(4)]
    own = [frame(tmp_path / "x" / f"{video}.png", video, 1, part) for video in (2, 50)]
    (hint,) = near_copies.hints([*training, *own], tmp_path)
    assert hint.startswith(
        f"1 of 2 {name} photos is nearly the same as a training photo, such as x/2.png and 2.png ("
    )
    split = "--split FILE, a table path,fold in which they have the same fold"
    drawn = f"keep them in one part with {split}"
    given = f"the parts are given by the data set: change them there, or give {split}"
    assert hint.endswith(drawn if part == "valid" else given)
    (hint,) = near_copies.hints([*training, *own], tmp_path, "the folders")
    assert hint.endswith(f"the parts are given by the folders: change them there, or give {split}")
    assert list(near_copies.hints(training, tmp_path)) == []


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("a/video {v}/{n}.png", "data.group=folder"),
        ("a/RC{v}_c{n}.png", r"'data.group=(.*?[^0-9])[0-9]+\.'"),
        ("a/{n}{v}.png", "--split FILE, a table path,fold in which they have the same fold"),
    ],
)
def test_the_remedy_keeps_copies_together(tmp_path, name, remedy):
    def one(video, number, part):
        path = tmp_path / name.format(v=chr(98 + video), n=number)
        return frame(path, video, number, part)

    photos = [one(video, n, "valid" if n else "train") for video in range(6) for n in range(2)]
    (hint,) = near_copies.hints(photos, tmp_path)
    assert hint.endswith(f"keep them in one part with {remedy}")


def test_large_sets_are_compared_in_part(tmp_path, monkeypatch):
    monkeypatch.setattr(near_copies, "MAX_PHOTOS", 3)
    monkeypatch.setattr(near_copies, "_CHUNK", 2)
    training = [frame(tmp_path / f"{video}.png", video) for video in range(9)]
    own = [frame(tmp_path / "x" / f"{video}.png", video, 1, "valid") for video in range(9)]
    assert len(near_copies.near_copies(own, training)) == 3
