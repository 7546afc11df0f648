import numpy as np
import pytest
from PIL import Image

from serving.imaging.preprocess import Preprocess
from training.preview import photo_sheet, scan
from training.preview.photo_sheet import COLUMNS, MAX_CLASSES, TILE

GREEN, WHITE, RED = (20, 140, 30), (250, 250, 250), (200, 20, 20)


def save(path, size=(60, 60), colour=GREEN, spot=None):
    """A photo of one colour, with a black and white chessboard in the box `spot` if given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, colour)
    if spot:
        left, top, right, bottom = spot
        board = np.indices((bottom - top, right - left)).sum(axis=0) // 4 % 2 * 255
        image.paste(Image.fromarray(board.astype(np.uint8)), (left, top))
    image.save(path)
    return path


def stats(path, label):
    return scan.photo_stats(path, "train", label)


def rows_by_title(photos, classes, **options):
    sheet = photo_sheet.rows(photos, classes, Preprocess(**options), seed=0)
    return {row.title: row for row in sheet}


def test_every_class_has_a_row_of_its_own_photos(tmp_path):
    photos = [stats(save(tmp_path / f"a{i}.png"), "a") for i in range(12)]
    photos += [stats(save(tmp_path / "b.png"), "b")]
    rows = rows_by_title(photos, ["a", "b", "empty"])
    chosen = rows["a: 12 photos"].photos
    assert len({photo.path for photo in chosen}) == COLUMNS
    assert {photo.label for photo in chosen} == {"a"}
    assert [photo.label for photo in rows["b: 1 photo"].photos] == ["b"]
    assert rows["empty: 0 photos"].photos == []


def test_the_choice_depends_on_the_seed_alone(tmp_path):
    photos = [stats(save(tmp_path / f"{i}.png"), "a") for i in range(30)]
    first, again, other = (
        [p.path for p in next(photo_sheet.rows(photos, ["a"], Preprocess(), seed)).photos]
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_more_classes_than_rows_are_counted(tmp_path):
    photos = [stats(save(tmp_path / f"{i}.png"), f"c{i}") for i in range(MAX_CLASSES + 3)]
    titles = list(rows_by_title(photos, [photo.label for photo in photos]))
    assert titles[MAX_CLASSES - 1] == f"c{MAX_CLASSES - 1}: 1 photo"
    assert titles[MAX_CLASSES] == "and 3 more classes"


def test_the_photo_that_is_unlike_its_class_is_first(tmp_path):
    photos = [
        stats(save(tmp_path / f"g{i}.png", colour=(20, 140 + i, 30)), "green") for i in range(9)
    ]
    photos += [
        stats(save(tmp_path / f"r{i}.png", colour=(200 - i, 20, 20)), "red") for i in range(9)
    ]
    odd = stats(save(tmp_path / "odd.png", colour=RED), "green")
    assert photo_sheet.most_unlike_class([*photos, odd])[0] is odd


def test_nothing_is_unlike_a_class_of_a_few_photos(tmp_path):
    few = [stats(save(tmp_path / f"{i}.png", colour=(i * 60, 0, 0)), "a") for i in range(4)]
    assert photo_sheet.most_unlike_class(few) == []


@pytest.mark.parametrize(
    ("spot", "low", "high"),
    [((0, 0, 20, 100), 0.95, 1), ((140, 40, 160, 60), 0.0, 0.05), (None, 0, 0)],
    ids=["at the left end", "in the middle", "no detail at all"],
)
def test_detail_outside_the_crop_of_a_long_photo(tmp_path, spot, low, high):
    photo = stats(save(tmp_path / "x.png", size=(300, 100), spot=spot), "a")
    assert low <= photo_sheet.detail_outside(photo, crop=0.875) <= high


def test_nothing_is_outside_the_crop_of_a_whole_square(tmp_path):
    photo = stats(save(tmp_path / "x.png", size=(100, 100), spot=(0, 0, 30, 100)), "a")
    assert photo_sheet.detail_outside(photo, crop=1) == pytest.approx(0, abs=1e-6)
    assert photo_sheet.detail_outside(photo, crop=0.5) > 0.5


def test_long_photos_and_photos_with_a_subject_at_the_edge_are_shown_with_the_frame(tmp_path):
    plain = [stats(save(tmp_path / f"p{i}.png", spot=(20, 20, 40, 40)), "a") for i in range(9)]
    long = stats(save(tmp_path / "long.png", size=(200, 60)), "a")
    edge = stats(save(tmp_path / "edge.png", size=(80, 60), spot=(0, 0, 12, 60)), "a")
    framed = [row for row in rows_by_title([*plain, long, edge], ["a"]).values() if row.framed]
    assert [row.photos[0] for row in framed] == [long, edge]
    assert long not in framed[1].photos
    for fit in ("squish", "pad"):  # which cut nothing off
        rows = rows_by_title([*plain, long, edge], ["a"], fit=fit)
        assert not any(row.framed for row in rows.values())
        assert rows["longest"].photos == [long]


def test_the_longest_photos_are_drawn_as_the_network_sees_them(tmp_path):
    ends = Image.new("RGB", (600, 200), GREEN)
    ends.paste(RED, (0, 0, 100, 200))
    ends.save(tmp_path / "long.png")
    photos = [stats(tmp_path / "long.png", "a")]
    rows = [row for row in photo_sheet.rows(photos, [], Preprocess(fit="pad"), 0) if row.fit]
    assert [row.fit for row in rows] == ["crop", "squish", "pad"]
    assert [row.title.endswith(", as in this recipe") for row in rows] == [False, False, True]
    preprocess = Preprocess(background=(0, 0, 255))
    crop, squish, pad = (
        np.asarray(photo_sheet._tile(row.photos[0], row, preprocess)).astype(int) for row in rows
    )
    assert [(tile[60, 60] == GREEN).all() for tile in (crop, squish, pad)] == [True] * 3
    assert [(tile[60, 10] == RED).all() for tile in (crop, squish, pad)] == [False, True, True]
    assert [(tile[10, 60] == (0, 0, 255)).all() for tile in (crop, squish, pad)] == [
        *(False, False, True)
    ]


@pytest.mark.parametrize("size", [(1, 5000), (5000, 1)])
@pytest.mark.parametrize("fit", ["crop", "squish", "pad"])
def test_a_photo_of_which_the_frame_is_less_than_a_pixel_is_drawn(tmp_path, size, fit):
    photos = [stats(save(tmp_path / "thin.png", size), "a")]
    rows = list(photo_sheet.rows(photos, [], Preprocess(fit=fit), 0))
    assert any(row.framed for row in rows) == (fit == "crop")
    photo_sheet.draw(rows, tmp_path, Preprocess(fit=fit), tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").exists()


def test_without_long_photos_there_is_no_row_of_them(tmp_path):
    photos = [stats(save(tmp_path / f"{i}.png"), "a") for i in range(3)]
    assert not any(title.startswith("longest") for title in rows_by_title(photos, ["a"]))


def test_the_whole_photo_is_drawn_with_the_frame_of_the_crop(tmp_path):
    long = stats(save(tmp_path / "long.png", size=(240, 120), colour=WHITE), "été\n" * 300)
    row = photo_sheet.Row("title\x1b", [long], named=True, framed=True)
    path = tmp_path / "sheet.png"
    photo_sheet.draw([row], tmp_path, Preprocess(crop=0.5), path)
    with Image.open(path) as image:
        sheet = np.asarray(image).astype(int)
    mark = np.abs(sheet - np.array([0xC2, 0x41, 0x0C])).sum(axis=2) == 0
    where = np.argwhere(mark)
    height, width = where.max(axis=0) - where.min(axis=0) + 1
    # Half of the short side of 120 pixels, drawn at half the size.
    assert (width, height) == pytest.approx((TILE / 4, TILE / 4), abs=2)


def test_photos_that_cant_be_read_again_leave_an_empty_tile(tmp_path):
    photo = stats(save(tmp_path / "x.png"), "a")
    photo.path.unlink()
    photo_sheet.draw([photo_sheet.Row("a", [photo])], tmp_path, Preprocess(), tmp_path / "s.png")
    with Image.open(tmp_path / "s.png") as sheet:
        tile = np.asarray(sheet)[TILE // 2 : TILE, photo_sheet.GAP : TILE]
    assert np.ptp(tile) == 0


def test_unreadable_photos_are_left_out(tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"no photo")
    photo = stats(tmp_path / "x.jpg", "a")
    assert photo.error
    assert [row.photos for row in rows_by_title([photo], ["a"]).values()] == [[]]
