import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from training.augmentation.mixup import mix
from training.config.sections import AugmentConfig

N, CLASSES, SIDE = 6, 4, 20
MIXUP, CUTMIX = AugmentConfig(mixup=0.4), AugmentConfig(cutmix=1.0)
BOTH = AugmentConfig(mixup=0.4, cutmix=1.0)


def batch(n=N):
    """Photos of one value each: every pixel identifies its photo."""
    values = torch.arange(n).float()[:, None, None, None]
    return values.expand(n, 3, SIDE, SIDE) / n, torch.arange(n) % CLASSES


def run(config, step=0, seed=0, n=N):
    images, labels = batch(n)
    return mix(config, images, labels, CLASSES, seed, step)


def test_without_mixing_photos_and_labels_are_unchanged():
    images, labels = batch()
    mixed, targets = run(AugmentConfig())
    assert torch.equal(mixed, images)
    assert torch.equal(targets, F.one_hot(labels, CLASSES).float())


@pytest.mark.parametrize("config", [MIXUP, CUTMIX, BOTH])
def test_targets_are_float32_and_sum_to_one(config):
    for step in range(20):
        mixed, targets = run(config, step)
        assert targets.dtype == torch.float32
        assert targets.shape == (N, CLASSES)
        assert torch.allclose(targets.sum(dim=1), torch.ones(N))
        assert float(targets.min()) >= 0
        assert mixed.shape == (N, 3, SIDE, SIDE)


@pytest.mark.parametrize("config", [MIXUP, CUTMIX, BOTH])
def test_a_batch_depends_on_seed_and_step_only(config):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = run(config, step=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = run(config, step=3)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    for other in (run(config, step=4), run(config, step=3, seed=1)):
        assert not torch.equal(one[0], other[0])


@pytest.mark.parametrize("config", [MIXUP, CUTMIX])
def test_the_inputs_are_not_modified(config):
    images, labels = (value.clone() for value in batch())
    before = images.clone()
    mix(config, images, labels, CLASSES, 0, 0)
    assert torch.equal(images, before)


def share_and_partners(targets):
    """(share of the first photo, partner of each); each photo has its own class."""
    own = torch.eye(len(targets), dtype=torch.bool)
    partner = targets.masked_fill(own, 0).argmax(dim=1)
    unmixed = targets.diag() == 1
    return float(targets.diag().min()), torch.where(unmixed, torch.arange(len(targets)), partner)


def run_with_partners(config, step=0):
    """Input photos, mixed photos, targets, share, partners."""
    images, _ = batch()
    mixed, targets = mix(config, images, torch.arange(N), N, 0, step)
    return images, mixed, targets, *share_and_partners(targets)


@pytest.mark.parametrize("config", [MIXUP, CUTMIX, BOTH])
def test_targets_are_mixed_in_the_proportion_of_the_pixels(config):
    for step in range(30):
        images, mixed, _, share, partner = run_with_partners(config, step)
        expected = share * images + (1 - share) * images[partner]
        assert torch.allclose(mixed.mean(dim=(1, 2, 3)), expected.mean(dim=(1, 2, 3)), atol=1e-5)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_mixup_shares_have_the_beta_distribution(alpha):
    config = AugmentConfig(mixup=alpha)
    images, labels = torch.zeros(3, 1, 1, 1), torch.arange(3)
    rows = [mix(config, images, labels, 3, 0, step)[1] for step in range(500)]
    found = torch.tensor([share_and_partners(row)[0] for row in rows])
    found = found[found < 1]  # 1 in 6 permutations of 3 is the identity
    assert float(found.mean()) == pytest.approx(0.5, abs=0.06)
    variance = 1 / (4 * (2 * alpha + 1))
    assert float(found.var()) == pytest.approx(variance, rel=0.2)


def test_mixup_equals_torchvision(monkeypatch):
    """Share and partners are the same in both."""
    images, mixed, targets, share, partner = run_with_partners(MIXUP)
    theirs = v2.MixUp(num_classes=N)
    monkeypatch.setattr(theirs, "make_params", lambda _: {"lam": share})
    for i in range(N):
        pair = [i, int(partner[i])]  # torchvision mixes each photo with the previous one
        expected, target = theirs(images[pair], torch.tensor(pair))
        assert torch.allclose(mixed[i], expected[0], atol=1e-6)
        assert torch.allclose(targets[i], target[0], atol=1e-6)


def test_cutmix_equals_torchvision(monkeypatch):
    """Rectangle and partners are the same in both, so the share equals the exact area."""
    for step in range(10):
        images, mixed, targets, _, partner = run_with_partners(CUTMIX, step)
        rows, columns = (mixed != images)[:, 0].any(dim=0).nonzero().T
        if not len(rows):
            continue
        top, bottom = int(rows.min()), int(rows.max()) + 1
        left, right = int(columns.min()), int(columns.max()) + 1
        share = 1 - (bottom - top) * (right - left) / SIDE**2
        params = {"box": (left, top, right, bottom), "lam_adjusted": share}
        theirs = v2.CutMix(num_classes=N)
        monkeypatch.setattr(theirs, "make_params", lambda _, params=params: params)
        for i in range(N):
            pair = [i, int(partner[i])]
            expected, target = theirs(images[pair], torch.tensor(pair))
            assert torch.equal(mixed[i], expected[0])
            assert torch.allclose(targets[i], target[0], atol=1e-6)


def test_cutmix_with_alpha_one_has_the_mean_share_of_torchvision():
    """The mean is about one half, plus the area that is clipped at the edges."""
    shares = [run_with_partners(CUTMIX, step)[3] for step in range(300)]
    torch.manual_seed(0)
    theirs = v2.CutMix(num_classes=2)
    picture = [torch.zeros(1, SIDE, SIDE)]
    expected = [theirs.make_params(picture)["lam_adjusted"] for _ in range(300)]
    assert sum(shares) / 300 == pytest.approx(sum(expected) / 300, abs=0.06)


def test_cutmix_pastes_the_same_rectangle_into_every_photo():
    for step in range(20):
        mixed, _ = run(CUTMIX, step)
        images, _ = batch()
        for one, image in zip(mixed, images, strict=True):
            rows, columns = (one[0] != image[0]).nonzero().T
            if len(rows):
                height, width = (int(at.max() - at.min()) + 1 for at in (rows, columns))
                assert height * width == len(rows)
                assert len(one.unique()) <= 2


def test_every_photo_is_mixed_into_exactly_one_photo():
    for step in range(20):
        mixed, targets = mix(MIXUP, batch()[0], torch.arange(N), N, 0, step)
        assert torch.allclose(targets.sum(dim=0), torch.ones(N), atol=1e-6)
        assert torch.allclose(mixed.mean(), batch()[0].mean(), atol=1e-6)


def test_with_both_options_each_is_used_for_half_of_the_batches():
    with_cutmix = 0
    for step in range(200):
        mixed, _ = run(BOTH, step)
        if all(float(one.std()) < 1e-5 for one in mixed):
            continue
        with_cutmix += 1
    assert 60 < with_cutmix < 130  # some rectangles are empty after clipping


def test_soft_targets_train_with_label_smoothing():
    _, targets = run(BOTH)
    loss = F.cross_entropy(torch.zeros(N, CLASSES), targets, label_smoothing=0.1)
    assert float(loss) == pytest.approx(float(torch.tensor(float(CLASSES)).log()))
