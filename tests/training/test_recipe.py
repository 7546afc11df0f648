import csv
import json
import tomllib

import pytest
import torch

from serving import images
from serving.errors import DataError, OptionError, WorkError
from serving.preprocess import Preprocess
from tests.training.conftest import STAGE
from training import checkpoint, config, data, evaluate, options, pixels, trainer
from training import recipe as fine_tune
from training.activations import Precision, TrainFeed, ValidFeed, affordable_views
from training.best import Best
from training.model import normalise

CPU = Precision(torch.float32, torch.device("cpu"))
FROZEN = """
[[stage]]
name = "head"
lr = "find"
cycle_len = 2
views = {views}
[[stage]]
name = "tail"
unfreeze = 1
lr = 0.01
views = {views}
"""


@pytest.fixture
def lines():
    return []


def run(path, photos, out, lines, *overrides):
    return fine_tune.run(
        config.read(path, overrides), str(photos), out=out, device="cpu", say=lines.append
    )


def test_a_run_leaves_what_the_contract_says(recipe, photos, tmp_path, lines):
    path = recipe(STAGE.format(epochs=10))
    learns = ("arch=squeezenet1_1", "arch_args={}", "optimizer.kind=adamw", "stage.all.lr=0.001")
    folder = run(path, photos, tmp_path / "runs" / "one", lines, *learns)
    names = {p.name for p in folder.iterdir()}
    assert names == {"recipe.toml", "split.csv", "metrics.csv", "best.safetensors", "best.json"}
    assert (folder.parent / "latest").resolve() == folder.resolve()
    info = json.loads((folder / "best.json").read_text())
    assert info["classes"] == ["blue", "green", "red"]
    assert info["metrics"]["accuracy"] >= 0.9
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == [str(i) for i in range(1, 11)]
    again = config.parse(tomllib.loads((folder / "recipe.toml").read_text()), "recipe.toml")
    assert again == config.read(path, learns)


def test_evaluate_finds_again_what_best_json_says(recipe, photos, tmp_path, lines):
    folder = run(recipe(), photos, tmp_path / "run", lines)
    metrics = checkpoint.read_info(folder / "best.json").metrics
    result = evaluate.evaluate(folder)
    assert result.accuracy == metrics["accuracy"]
    assert result.loss == pytest.approx(metrics["loss"], rel=1e-9)
    with_tta = evaluate.evaluate(folder, tta=4)
    assert (with_tta.views, with_tta.photos) == (4, 9)


def test_the_same_seed_gives_the_same_weights(recipe, photos, tmp_path, lines):
    path = recipe()
    one = run(path, photos, tmp_path / "one", lines)
    two = run(path, photos, tmp_path / "two", lines)
    other = run(path, photos, tmp_path / "other", lines, "seed=5")
    weights = [(folder / checkpoint.BEST).read_bytes() for folder in (one, two, other)]
    assert weights[0] == weights[1] != weights[2]


def test_cached_activations_change_nothing(recipe, photos, tmp_path, lines):
    """With a view for every epoch the cache gives what running the prefix each time gives."""
    settings = config.read(recipe(), ["head.dropout=0"])
    classifier, _ = fine_tune.build_classifier(settings, 3, lines.append)
    classifier.freeze_to(1)
    classifier.eval()
    found = data.load(str(photos))
    _, train, _ = pixels.decode(found, settings.preprocess, lines.append)

    def feed(views):
        return TrainFeed(
            train, classifier.prefix, settings.preprocess, settings.augment, CPU, 0, 7, views
        )

    cached, live = feed(2), feed(0)
    for epoch in range(2):
        pairs = zip(cached.epoch(epoch, 8), live.epoch(epoch, 8), strict=True)
        for (a, label_a), (b, label_b) in pairs:
            assert torch.equal(label_a, label_b)
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    first = next(iter(cached.epoch(0, 8)))[0]
    assert torch.equal(first, next(iter(cached.epoch(0, 8)))[0])
    assert not torch.allclose(first, next(iter(cached.epoch(1, 8)))[0])


def test_views_shrink_to_the_budget(recipe, lines):
    settings = config.read(recipe())
    classifier, _ = fine_tune.build_classifier(settings, 3, lines.append)
    classifier.eval()
    classifier.freeze_to(0)
    a_view = 2560 * 4 * 100  # the pooled width in float32, for 100 photos
    prefix = classifier.prefix
    for budget, views in ((10 * a_view, 4), (2.5 * a_view, 2), (0.5 * a_view, 0), (0, 0)):
        assert affordable_views(4, 100, prefix, 32, CPU, int(budget)) == views
    classifier.freeze_to(99)
    assert affordable_views(4, 100, classifier.prefix, 32, CPU, 10**12) == 0


def test_frozen_stages_after_a_pretrained_start(recipe, photos, tmp_path, lines):
    import torchvision

    torch.manual_seed(0)
    weights = tmp_path / "w.pth"
    torch.save(torchvision.models.mobilenet_v2(width_mult=0.25).state_dict(), weights)
    folder = run(
        recipe(FROZEN.format(views=2)), photos, tmp_path / "run", lines, f"weights={weights}"
    )
    assert (folder / "lr_find-head.png").read_bytes().startswith(b"\x89PNG")
    trained, _ = checkpoint.load(folder)
    start = torch.load(weights)
    assert torch.equal(trained.state_dict()["body.0.0.weight"], start["features.0.0.weight"])


def test_validation_pixels_are_the_services(photos):
    settings = options.Recipe.model_validate(
        {"name": "x", "arch": "resnet18", "stage": [{"name": "s"}], "preprocess": {"size": 24}}
    )
    found = data.load(str(photos))
    _, _, valid = pixels.decode(found, settings.preprocess, print)
    for sample, row in zip(found.valid, valid.pixels, strict=True):
        served = settings.preprocess(images.decode(sample.path.read_bytes()).image)
        assert (row.numpy() == served).all()
    for keep in (True, False):
        feed = ValidFeed(valid, torch.nn.Sequential(), settings.preprocess, CPU, keep)
        for _ in range(2):
            inputs = torch.cat([batch for batch, _ in feed])
            assert torch.equal(inputs, normalise(valid.pixels, settings.preprocess))


def test_broken_photos_are_named_counted_and_left_out(recipe, photos, tmp_path, lines):
    broken = photos / "red" / "3.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    (photos / "red" / "4.jpg").write_text("not a photo")
    folder = run(recipe(), photos, tmp_path / "run", lines)
    text = "\n".join(lines)
    assert f"skipped {broken}" in text
    assert "2 of 45 photos can't be read" in text
    assert "red/3.jpg" not in (folder / "split.csv").read_text()
    for i in range(5, 8):
        (photos / "red" / f"{i}.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"5 of 45 photos can't be read.*more than 5%"):
        run(recipe(), photos, tmp_path / "second", lines)
    assert not (tmp_path / "second").exists()


def test_nothing_is_written_when_the_request_is_wrong(recipe, photos, tmp_path, lines):
    for override, error in (
        ("arch=resnet999", OptionError),
        ("weights=nowhere.pth", DataError),
        ("arch_args.depth=3", OptionError),
    ):
        with pytest.raises(error):
            run(recipe(), photos, tmp_path / "run", lines, override)
    with pytest.raises(OptionError, match="size = 8 does not fit squeezenet1_1"):
        run(recipe(), photos, tmp_path / "run", lines, "arch=squeezenet1_1", "arch_args={}",
            "preprocess.size=8")  # fmt: skip
    assert not (tmp_path / "run").exists()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    with pytest.raises(OptionError, match="exists already"):
        run(recipe(), photos, tmp_path / "taken", lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_an_error_when_it_was_asked_for():
    with pytest.raises(OptionError, match="--device cuda: no usable GPU"):
        fine_tune.choose_precision("cuda", "auto")
    assert fine_tune.choose_precision("auto", "auto").device.type == "cpu"


def test_runs_that_start_together_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [fine_tune._claim(None, "quick") for _ in range(3)]
    assert [str(f) for f in folders] == ["runs/quick", "runs/quick-2", "runs/quick-3"]


def test_weights_that_broke_in_the_last_step_are_noticed(recipe, photos, tmp_path, lines):
    original = trainer.validate

    def broken(classifier, *rest):
        with torch.no_grad():
            classifier.head[-1].bias.fill_(float("nan"))
        return original(classifier, *rest)

    trainer.validate = broken
    try:
        with pytest.raises(WorkError, match="the validation loss is nan after epoch 1"):
            run(recipe(), photos, tmp_path / "run", lines)
    finally:
        trainer.validate = original
    assert not (tmp_path / "run" / "best.json").exists()


def test_a_disk_too_small_for_the_photos_is_said(photos, monkeypatch):
    def full(_file, _start, _size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(WorkError, match=r"decoded photos need .* GB.*No space left.*TMPDIR"):
        pixels.decode(data.load(str(photos)), Preprocess(size=32), print)


def test_a_loss_that_is_no_number_ends_with_stage_step_and_rate(recipe, photos, tmp_path, lines):
    with pytest.raises(WorkError, match=r"stage all: the loss is \w+ at epoch \d, step \d+, rate"):
        run(recipe(), photos, tmp_path / "run", lines, "stage.all.lr=1e30")


def test_auto_weights_fall_back_aloud(recipe, lines, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", _no_network, raising=True
    )
    settings = config.read(recipe(), ["weights=auto", "arch_args={}"])
    _, pretrained = fine_tune.build_classifier(settings, 3, lines.append)
    assert not pretrained
    assert "training from scratch" in lines[0]
    with pytest.raises(DataError, match="can't be fetched"):
        fine_tune.build_classifier(
            settings.model_copy(update={"weights": "imagenet"}), 3, lines.append
        )


def _no_network(*_args, **_options):
    from urllib.error import URLError

    raise URLError("no network")


def test_the_best_epoch_is_kept_not_the_last(recipe, photos, tmp_path, lines):
    settings = config.read(recipe())
    found = data.load(str(photos))
    classifier, _ = fine_tune.build_classifier(settings, 3, lines.append)
    best = Best(tmp_path, settings, found, classifier, lines.append)
    figures = [(0.5, 1.0), (0.8, 0.7), (0.8, 0.6), (0.7, 0.1), (0.8, 0.65)]
    for number, (accuracy, loss) in enumerate(figures, start=1):
        with torch.no_grad():
            classifier.head[-1].bias.fill_(number)
        best.see(trainer.Epoch("all", number, 0.1, 1.0, loss, accuracy, 0.0))
    kept, info = checkpoint.load(tmp_path)
    assert info.metrics["epoch"] == 3
    assert kept.head[-1].bias[0].item() == 3
