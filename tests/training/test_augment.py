import torch

from training import augment
from training.options import AugmentConfig

PLAIN = AugmentConfig(flip="none", scale=(1, 1), ratio=1, max_rotate=0, max_lighting=0)


def squares(n=3, side=16):
    torch.manual_seed(0)
    return torch.randint(0, 256, (n, side, side, 3), dtype=torch.uint8)


def test_no_change_changes_nothing():
    pixels = squares()
    warp, light = augment.draw(PLAIN, torch.ones(3), 0, 0)
    out = augment.apply(pixels, warp, light, 16)
    assert torch.allclose(out, pixels.float(), atol=1e-3)


def test_a_draw_is_a_function_of_seed_view_and_photo():
    aspect = torch.tensor([1.0, 1.5, 0.7])
    config = AugmentConfig()
    one, again = augment.draw(config, aspect, 1, 2), augment.draw(config, aspect, 1, 2)
    assert torch.equal(one[0], again[0])
    assert torch.equal(one[1], again[1])
    for seed, view in ((2, 2), (1, 3)):
        assert not torch.equal(one[0], augment.draw(config, aspect, seed, view)[0])
    pixels = squares()
    whole = augment.apply(pixels, *one, 8)
    alone = augment.apply(pixels[1:2], one[0][1:2], one[1][1:2], 8)
    assert torch.allclose(whole[1:2], alone, atol=1e-4)  # batches do not decide


def test_flips_mirror_half_of_the_photos():
    config = PLAIN.model_copy(update={"flip": True})
    pixels = squares(64)
    out = augment.apply(pixels, *augment.draw(config, torch.ones(64), 0, 0), 16)
    same = (out - pixels.float()).abs().amax(dim=(1, 2, 3)) < 1e-2
    mirrored = (out - pixels.flip(2).float()).abs().amax(dim=(1, 2, 3)) < 1e-2
    assert bool((same ^ mirrored).all())
    assert 16 < int(mirrored.sum()) < 48


def test_crops_stay_inside_the_photo_and_undo_the_squeeze():
    """The box in pixels of the photo is square however wide the photo is."""
    config = PLAIN.model_copy(update={"scale": (0.2, 1.0)})
    aspect = torch.tensor([3.0, 0.4, 1.0]).repeat(50)
    warp, _ = augment.draw(config, aspect, 0, 0)
    reach = warp[:, :, :2].abs().sum(2) + warp[:, :, 2].abs()
    assert float(reach.max()) <= 1 + 1e-6
    width, height = aspect.clamp(min=1), (1 / aspect).clamp(min=1)
    across, down = warp[:, 0, 0] * width, warp[:, 1, 1] * height
    assert torch.allclose(across, down, atol=1e-5)
    area = across**2
    assert 0.2 - 1e-5 <= float(area.min()) < 0.3
    assert 0.9 < float(area.max()) <= 1 + 1e-5


def test_light_stays_in_range():
    config = AugmentConfig(max_lighting=0.5)
    out = augment.apply(squares(), *augment.draw(config, torch.ones(3), 0, 0), 16)
    assert float(out.min()) >= 0
    assert float(out.max()) <= 255
