import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from serving.imaging.preprocess import Preprocess
from tests.support.augmented import COLOUR, channels_last, plain, run, smooth, squares
from training.augmentation import policies, transforms
from training.config.sections import PRESETS, AugmentConfig
from training.pixels.transform import PixelTransform

PRESET = sorted(PRESETS)
EVERYTHING = AugmentConfig(
    max_shift=0.2, max_warp=0.3, flip="dihedral", max_hue=0.5, erase=0.5, policy="rand_augment"
)


def corners(config, n=200, aspect=1.0, seed=0, **more):
    """Corners of the result in the photo: float32 [n, 4, 2], in units of half its sides."""
    warp = transforms.draw(config, torch.full((n,), aspect), seed, 0, **more).warp
    square = torch.tensor([[-1.0, -1, 1], [1, -1, 1], [1, 1, 1], [-1, 1, 1]])
    at = square @ warp.transpose(1, 2)
    return at[..., :2] / at[..., 2:]


def sides(at):
    """Lengths of the four sides, [n, 4]."""
    return (at - at.roll(-1, dims=1)).norm(dim=2)


# -- random parameters


def test_the_plain_config_changes_nothing():
    pixels = squares()
    assert torch.allclose(run(plain(), pixels), pixels.float(), atol=1e-3)


@pytest.mark.parametrize("aspect", [1.0, 1.5, 0.6])
@pytest.mark.parametrize("presize", [1, 1.5, 3])
def test_without_augmentation_training_photos_equal_validation_photos(aspect, presize):
    preprocess = Preprocess(size=64)
    photo = Image.fromarray(channels_last(smooth(1, 240))[0].numpy())
    photo = photo.resize((round(200 * aspect), 200))
    squeezed = PixelTransform("train", preprocess, presize).to_square(photo).copy()
    params = transforms.draw(
        plain(), torch.tensor([photo.width / photo.height]), 0, 0, crop=preprocess.crop
    )
    seen = transforms.apply(torch.from_numpy(squeezed)[None], params, plain(), preprocess.size)[0]
    apart = (seen - torch.from_numpy(preprocess(photo).copy()).float()).abs()
    assert float(apart.max()) < 8
    assert float(apart.mean()) < 1


@pytest.mark.parametrize("preset", PRESET)
def test_parameters_depend_on_seed_view_and_photo_only(preset):
    config = EVERYTHING.model_copy(
        update=AugmentConfig(preset=preset).model_dump(include={"scale"})
    )
    aspect = torch.tensor([1.0, 1.5, 0.7, 1.0])
    many = transforms.draw(config, aspect, 1, 2)
    few = transforms.draw(config, aspect[:2], 1, 2)
    other = {(s, v): transforms.draw(config, aspect, s, v) for s, v in ((2, 2), (1, 3))}
    for name in ("warp", "colour", "hole", "seed"):
        assert torch.equal(getattr(many, name)[:2], getattr(few, name))
        assert torch.equal(getattr(many, name)[:2], getattr(many[torch.arange(2)], name))
    for params in other.values():
        assert not torch.equal(many.warp, params.warp)
        assert not torch.equal(many.seed, params.seed)
    assert not torch.equal(many.warp[0], many.warp[3])  # the same aspect, another photo
    assert len(many) == 4
    assert many.to(torch.device("meta")).warp.device.type == "meta"


def test_an_option_does_not_change_the_draws_of_the_others():
    """Comparisons with and without an option are therefore paired."""
    base = plain(scale=(0.5, 1.0), crop="random", flip="horizontal")
    before = corners(base)
    assert torch.equal(before, corners(base.model_copy(update={"erase": 0.5, "max_lighting": 0.3})))
    without, hue = (
        transforms.draw(config, torch.ones(9), 0, 0)
        for config in (AugmentConfig(), AugmentConfig(max_hue=0.5))
    )
    assert torch.equal(without.warp, hue.warp)
    assert torch.equal(without.colour[:, :3], hue.colour[:, :3])
    assert torch.equal(without.colour[:, 3:], torch.tensor([1.0, 0]).expand(9, 2))
    assert int((hue.colour[:, 4].abs() > 0.01).sum()) == 9
    rotated = corners(base.model_copy(update={"max_rotate": 20.0}))
    assert not torch.equal(before, rotated)
    assert torch.allclose(before.mean(dim=1), rotated.mean(dim=1), atol=1e-6)
    assert torch.allclose(sides(before), sides(rotated), atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [AugmentConfig(), AugmentConfig(max_hue=0.2), plain(max_hue=0.5), EVERYTHING],
    ids=["photo", "photo and hue", "hue", "everything"],
)
def test_a_photo_does_not_depend_on_its_batch(config):
    """Pixels are equal bit for bit, with batches large enough for several threads."""
    pixels = channels_last(smooth(12, 150))
    params = transforms.draw(config, torch.full((12,), 1.3), 0, 0)
    together = transforms.apply(pixels, params, config, 120)
    for index in (torch.tensor([5]), torch.tensor([11, 0, 5])):
        part = transforms.apply(pixels[index], params[index], config, 120)
        assert torch.equal(part, together[index])


@pytest.mark.parametrize("preset", PRESET)
def test_every_preset_returns_valid_pixels(preset):
    config = AugmentConfig(preset=preset)
    out = run(config, squares(), 8, aspect=1.4)
    assert out.shape == (3, 8, 8, 3)
    assert out.dtype == torch.float32
    assert float(out.min()) >= 0
    assert float(out.max()) <= 255


# -- the warp


@pytest.mark.parametrize(("flip", "symmetries"), [("none", 1), ("horizontal", 2), ("dihedral", 8)])
def test_flips_draw_all_symmetries_equally_often(flip, symmetries):
    count = 400
    one = squares(1)
    out = run(plain(flip=flip), one.expand(count, -1, -1, -1))
    picture = one[0].float()
    turned = [torch.rot90(picture, k, (0, 1)) for k in range(4)]
    all_eight = turned + [image.flip(1) for image in turned]
    known = {1: all_eight[:1], 2: [picture, picture.flip(1)], 8: all_eight}[symmetries]
    seen = torch.stack([(out - image).abs().amax(dim=(1, 2, 3)) < 1e-2 for image in known])
    assert bool((seen.sum(dim=0) == 1).all())  # exactly one each time
    often = seen.sum(dim=1) / count * symmetries
    assert bool(((often > 0.6) & (often < 1.4)).all())


def flips(config, photos, seed, views):
    """Number of the symmetry of the square of each view and photo: int64 [views, photos]."""
    drawn = torch.stack([transforms._flips(config, photos, seed, view) for view in range(views)])
    same = (drawn[:, :, None] == transforms._SYMMETRIES).all(dim=(3, 4))  # [views, photos, 8]
    assert bool((same.sum(dim=2) == 1).all())
    return same.long().argmax(dim=2)


def test_of_two_consecutive_views_of_a_photo_one_is_mirrored():
    photos, views = 400, 7
    mirrored = flips(plain(flip="horizontal"), photos, 1, views)
    assert set(mirrored.unique().tolist()) == {0, 1}
    assert bool((mirrored[1:] != mirrored[:-1]).all())
    first = mirrored[0].float()
    assert 0.4 < float(first.mean()) < 0.6  # each photo begins by chance
    assert 0.4 < float((first[1:] == first[:-1]).float().mean()) < 0.6
    assert torch.equal(mirrored[:, :9], flips(plain(flip="horizontal"), 9, 1, views))
    other = flips(plain(flip="horizontal"), photos, 2, 1)[0]
    assert 0.4 < float((other == mirrored[0]).float().mean()) < 0.6


def test_of_eight_consecutive_views_of_a_photo_each_has_another_symmetry():
    photos = 400
    seen = flips(plain(flip="dihedral"), photos, 0, 11)
    for start in range(4):
        eight = seen[start : start + 8].sort(dim=0).values
        assert torch.equal(eight, torch.arange(8)[:, None].expand(8, photos))
    pairs = (seen[0] * 8 + seen[1]).unique()
    assert len(pairs) == 8 * 7  # photos have different orders


def test_random_crops_stay_inside_and_restore_the_aspect_ratio():
    """In pixels of the photo the crop is square for every aspect ratio."""
    config = plain(crop="random", scale=(0.2, 1.0))
    for aspect in (3.0, 0.4, 1.0):
        at = corners(config, aspect=aspect)
        assert float(at.abs().max()) <= 1 + 1e-5
        lengths = sides(at * torch.tensor([max(aspect, 1), max(1 / aspect, 1)]))
        assert torch.allclose(lengths, lengths[:, :1].expand(-1, 4), atol=1e-5)
        area = (lengths[:, 0] / 2) ** 2
        assert 0.2 - 1e-5 <= float(area.min()) < 0.25
        assert 0.95 < float(area.max()) <= 1 + 1e-5
        assert area.mean() == pytest.approx(0.6, abs=0.05)  # uniform in the area
        middle = at.mean(dim=1)
        assert float(middle.amax()) > 0.3  # at any position
        assert float(middle.amin()) < -0.3


def test_centre_crops_equal_the_crop_of_validation():
    at = corners(plain(), aspect=2.0, crop=0.8)
    expected = torch.tensor([[-0.4, -0.8], [0.4, -0.8], [0.4, 0.8], [-0.4, 0.8]])
    assert torch.allclose(at, expected.expand(200, 4, 2), atol=1e-6)
    smaller = corners(plain(scale=(0.25, 0.25)), crop=0.8)
    assert float(smaller.abs().max()) == pytest.approx(0.4)


def test_the_aspect_ratio_of_crops_is_limited():
    lengths = sides(corners(plain(crop="random", scale=(0.3, 0.5), ratio=1.5)))
    ratio = lengths[:, 0] / lengths[:, 1]
    assert 1 / 1.5 - 1e-4 < float(ratio.min()) < 0.7
    assert 1.4 < float(ratio.max()) < 1.5 + 1e-4
    assert float((lengths[:, 0] * lengths[:, 1] / 4).min()) > 0.3 - 1e-4  # of the same area


def test_rotation_is_limited_in_both_directions():
    at = corners(plain(max_rotate=30))
    edge = at[:, 1] - at[:, 0]
    angle = torch.rad2deg(torch.atan2(edge[:, 1], edge[:, 0]))
    assert -30 <= float(angle.min()) < -25
    assert 25 < float(angle.max()) <= 30
    assert torch.allclose(sides(at), torch.tensor(2.0), atol=1e-5)
    picture = smooth(1, 64)
    out = run(plain(max_rotate=30), channels_last(picture)).permute(0, 3, 1, 2)
    angle = corners(plain(max_rotate=30), n=1)[0]
    degrees = float(torch.rad2deg(torch.atan2(*(angle[1] - angle[0]).flip(0))))
    same = TF.rotate(picture, degrees, interpolation=TF.InterpolationMode.BILINEAR)
    middle = slice(16, 48)
    assert float((out - same)[..., middle, middle].abs().max()) < 2


def test_zoom_and_shift_stay_in_their_ranges():
    reach = corners(plain(max_zoom=2.0)).abs().amax(dim=(1, 2))
    assert 0.5 <= float(reach.min()) < 0.53
    assert 0.95 < float(reach.max()) <= 1
    middle = corners(plain(max_shift=0.3, scale=(0.25, 0.25))).mean(dim=1)
    # in shares of the crop's side, which is 1 here
    assert 0.28 < float(middle.max()) <= 0.3
    assert -0.3 <= float(middle.min()) < -0.28


def test_pixels_from_outside_are_reflected_at_the_edge():
    pixels = squares(1)
    config = plain(max_shift=0.5)
    warp = torch.eye(3)[None].clone()
    warp[0, 0, 2] = 1.0  # half the photo to the right
    params = transforms.AugmentationParams(warp, COLOUR, torch.zeros(1, 4), torch.zeros(1).long())
    out = transforms.apply(pixels, params, config, 16)
    right = pixels[:, :, 8:].float()
    assert torch.allclose(out, torch.cat([right, right.flip(2)], dim=2), atol=1e-3)


def test_perspective_stays_inside_and_shortens_one_side():
    most = 0.4
    at = corners(plain(max_warp=most))
    assert float(at.abs().max()) <= 1 + 1e-5
    lengths = sides(at)
    for one, opposite in ((0, 2), (1, 3)):
        pair = lengths[:, [one, opposite]]
        shorter = 1 - pair.amin(dim=1) / pair.amax(dim=1)
        assert float(shorter.max()) > 0.3
        assert 0.4 < float((pair[:, 0] > pair[:, 1]).float().mean()) < 0.6
    only_sideways = transforms._tilt(torch.tensor([most, -most, 0.0]))
    square = torch.tensor([[-1.0, -1, 1], [1, -1, 1], [1, 1, 1], [-1, 1, 1]])
    seen = square @ only_sideways.transpose(1, 2)
    up_and_down = sides(seen[..., :2] / seen[..., 2:])[:, [1, 3]]
    expected = torch.tensor([[2 * (1 - most), 2], [2, 2 * (1 - most)], [2, 2]])
    assert torch.allclose(up_and_down, expected, atol=1e-6)


def test_perspective_equals_torchvision():
    side, config = 64, plain(max_warp=0.3)
    picture = smooth(1, side)
    at = corners(config, n=1)[0]
    places = ((at + 1) / 2 * side - 0.5).tolist()
    edge = [[-0.5, -0.5], [side - 0.5, -0.5], [side - 0.5, side - 0.5], [-0.5, side - 0.5]]
    coefficients = np.linalg.solve(*_perspective(edge, places)).tolist()
    same = TF.perspective(picture, None, None, coefficients=coefficients)
    out = run(config, channels_last(picture)).permute(0, 3, 1, 2)
    inside = slice(2, side - 2)
    assert float((out - same)[..., inside, inside].abs().max()) < 2
    assert float((out - picture).abs().max()) > 20


def _perspective(seen, source):
    """The linear equations of a homography from four pairs of points."""
    rows, right = [], []
    for (x, y), (u, v) in zip(seen, source, strict=True):
        # torchvision's coordinates are shifted by half a pixel
        x, y, u, v = x + 0.5, y + 0.5, u + 0.5, v + 0.5
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        right += [u, v]
    return np.array(rows), np.array(right)


# -- erasing and policies


def test_erasing_removes_one_rectangle_of_a_valid_size_with_its_probability():
    config = plain(erase=0.3)
    side = 100
    holes = transforms.draw(config, torch.ones(1000), 0, 0).hole
    width, height = holes[:, 2] - holes[:, 0], holes[:, 3] - holes[:, 1]
    erased = width > 0
    assert float(erased.float().mean()) == pytest.approx(0.3, abs=0.05)
    assert bool((holes[~erased] == 0).all())
    assert float(holes.min()) >= 0
    assert float(holes.max()) <= 1 + 1e-6
    area, ratio = (width * height)[erased], (width / height)[erased]
    assert 0.02 <= float(area.min()) < 0.05
    assert 0.3 < float(area.max()) <= 0.33 + 1e-5
    assert v2.RandomErasing().scale == transforms.ERASED_AREA
    assert 0.3 - 1e-4 <= float(ratio.min()) < 0.5
    assert 2 < float(ratio.max()) <= 10 / 3 + 1e-4

    pixels = torch.zeros(60, side, side, 3, dtype=torch.uint8)
    out = run(config, pixels)
    erased_pixels = (out == torch.tensor(transforms.MEAN_COLOUR)).all(dim=3)
    assert bool((erased_pixels | (out == 0).all(dim=3)).all())
    expected = ((width * side).round() * (height * side).round())[:60]
    counted = erased_pixels.sum(dim=(1, 2))
    assert torch.allclose(counted.float(), expected, atol=2.0 * side)
    assert bool(((counted > 0) == erased[:60]).all())


@pytest.mark.parametrize("policy", ["rand_augment", "trivial_augment"])
def test_a_policy_changes_photos_and_keeps_the_global_random_state(policy):
    config = plain(policy=policy)
    pixels = channels_last(smooth(12))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    out = run(config, pixels)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert torch.equal(run(config, pixels), out)
    changed = (out - pixels.float()).abs().amax(dim=(1, 2, 3)) > 3
    assert int(changed.sum()) >= 6
    assert torch.equal(out, out.round())
    assert not torch.equal(run(config, pixels, view=1), out)


def test_the_global_random_state_is_restored_after_an_error(monkeypatch):
    def fails(*_):
        torch.rand(1)
        raise RuntimeError("no")

    monkeypatch.setattr(policies, "_apply_to_image", fails)
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no"):
        run(plain(policy="rand_augment"), squares())
    assert torch.equal(torch.get_rng_state(), before)


def test_rand_augment_depends_on_number_and_magnitude_of_operations():
    pixels = channels_last(smooth(12))
    unchanged = run(plain(), pixels).round()
    weak = run(plain(policy="rand_augment", policy_ops=1, policy_magnitude=0), pixels)
    strong = run(plain(policy="rand_augment", policy_ops=4, policy_magnitude=28), pixels)
    assert float((strong - unchanged).abs().mean()) > 2 * float((weak - unchanged).abs().mean())
