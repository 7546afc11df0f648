import numpy as np
import pytest
from PIL import Image

from serving.errors import ImageError
from serving.imaging.preprocess import Preprocess
from training.config.sections import PRESETS, AugmentConfig
from training.pixels.transform import PixelTransform
from training.preview import augmentation_sheet
from training.preview.augmentation_sheet import COLUMNS, GAP, TILE

PREPROCESS = Preprocess(size=TILE)


@pytest.fixture
def photo(tmp_path):
    rng = np.random.default_rng(0)
    rough = Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8))
    rough.resize((360, 240), Image.Resampling.BICUBIC).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def tile(sheet, number):
    left = GAP + number % COLUMNS * (TILE + GAP)
    top = GAP + number // COLUMNS * (TILE + GAP)
    return np.asarray(sheet, dtype=float)[top + 4 : top + TILE - 4, left + 4 : left + TILE - 4]


def sheet_of(photo, config, presize=1.5, **options):
    path = photo.with_name("sheet.png")
    augmentation_sheet.write(photo, config, PREPROCESS, presize, path, **options)
    with Image.open(path) as sheet:
        assert sheet.format == "PNG"
        return sheet.convert("RGB")


def test_the_plain_photo_is_followed_by_the_draws(photo):
    sheet = sheet_of(photo, AugmentConfig(preset="top_down"), draws=7)
    plain = PREPROCESS(Image.open(photo))[4:-4, 4:-4].astype(float)
    assert np.abs(tile(sheet, 0) - plain).max() < 1
    drawn = [tile(sheet, number) for number in range(1, 8)]
    for number, one in enumerate(drawn):
        assert one.std() > 10
        assert all(np.abs(one - other).mean() > 1 for other in drawn[:number])
    assert (tile(sheet, 8) == 255).all()


def test_without_augmentation_every_tile_is_the_photo(photo):
    sheet = sheet_of(photo, AugmentConfig(preset="none"), draws=4)
    for number in range(1, 5):
        assert np.abs(tile(sheet, number) - tile(sheet, 0)).mean() < 2


@pytest.mark.parametrize("presize", [1, 2])
def test_draws_are_made_from_the_photo_at_presize(photo, presize, monkeypatch):
    inputs, original = [], augmentation_sheet.transforms.apply

    def apply(pixels, *arguments):
        inputs.append(pixels)
        return original(pixels, *arguments)

    monkeypatch.setattr(augmentation_sheet.transforms, "apply", apply)
    sheet_of(photo, AugmentConfig(), presize, draws=2)
    square = PixelTransform("train", PREPROCESS, presize).to_square(Image.open(photo))
    assert inputs.pop().numpy().tolist() == [square.tolist()] * 2
    assert square.shape == (presize * TILE, presize * TILE, 3)


def test_equal_seeds_give_equal_sheets(photo):
    config = AugmentConfig()
    first, second = (np.asarray(sheet_of(photo, config, draws=2)) for _ in range(2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, np.asarray(sheet_of(photo, config, draws=2, seed=1)))


def test_only_the_plain_photo_has_a_frame(photo):
    pixels = np.asarray(sheet_of(photo, AugmentConfig(), draws=9))
    marked = (pixels == [0xC2, 0x41, 0x0C]).all(axis=2)
    rows, columns = marked[: 2 * (TILE + GAP)].nonzero()
    assert rows.max() < GAP + TILE + 4
    assert columns.max() < GAP + TILE + 4
    assert (pixels[2 * (TILE + GAP) + GAP :] < 128).any()


def test_the_longest_text_stays_on_the_sheet(photo):
    config = AugmentConfig(
        flip="dihedral", max_shift=0.25, max_warp=0.25, policy="rand_augment", erase=0.5,
        mixup=0.4, cutmix=1.0,
    )  # fmt: skip
    pixels = np.asarray(sheet_of(photo, config, draws=1))
    assert (pixels[:, -GAP // 2 :] == 255).all()
    assert (pixels[-GAP // 2 :] == 255).all()


def test_an_unreadable_photo_is_an_error(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"no photo")
    with pytest.raises(ImageError):
        augmentation_sheet.write(
            tmp_path / "photo.jpg", AugmentConfig(), PREPROCESS, 1.5, tmp_path / "sheet.png"
        )
    assert not (tmp_path / "sheet.png").exists()


def test_presets_are_described_in_words():
    describe = augmentation_sheet.describe
    assert describe(AugmentConfig()) == (
        "photo: random crop of 35-100 % of the largest square, sides up to 1.2 : 1, flip, "
        "rotation ±10°, zoom to 1.1, brightness and contrast ±20 %, saturation ±20 %"
    )
    assert describe(AugmentConfig(preset="none")) == "none: centre crop"
    assert describe(AugmentConfig(preset="top_down")) == (
        "top_down: random crop, flips and quarter turns, rotation ±10°, "
        "brightness and contrast ±5 %"
    )


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("crop", "random", "random crop"),
        ("flip", "horizontal", "flip"),
        ("scale", (0.5, 0.8), "50-80 %"),
        ("ratio", 1.5, "1.5 : 1"),
        ("max_rotate", 25, "±25°"),
        ("max_zoom", 1.3, "zoom to 1.3"),
        ("max_shift", 0.1, "shift ±10 %"),
        ("max_warp", 0.2, "perspective ±20 %"),
        ("max_lighting", 0.05, "brightness and contrast ±5 %"),
        ("max_saturation", 0.3, "saturation ±30 %"),
        ("max_hue", 0.05, "hue ±18°"),
        ("policy", "rand_augment", "RandAugment with 2 operations of 9 / 30"),
        ("policy", "trivial_augment", "TrivialAugment"),
        ("erase", 0.25, "erased in 25 % of the draws"),
        ("mixup", 0.4, "mixup 0.4"),
        ("cutmix", 1.0, "cutmix 1"),
    ],
)
def test_every_changed_option_is_described_in_words(option, value, words):
    plain = augmentation_sheet.describe(AugmentConfig(preset="none"))
    changed = augmentation_sheet.describe(AugmentConfig(preset="none", **{option: value}))
    assert words in changed
    assert words not in plain
    assert changed.startswith("none, changed: ")


def test_the_described_options_are_all_options():
    tried = {mark for mark in AugmentConfig.model_fields} - {"preset", "policy_ops"}
    assert tried - {"policy_magnitude"} == {
        "crop", "flip", "scale", "ratio", "max_rotate", "max_zoom", "max_shift", "max_warp",
        "max_lighting", "max_saturation", "max_hue", "policy", "erase", "mixup", "cutmix",
    }  # fmt: skip
    assert set(PRESETS) == {"none", "basic", "side_on", "top_down", "photo"}
