import csv
import json
import tomllib
from pathlib import Path

import pytest
import torch

import fledge
from serving.errors import DataError, OptionError, WorkError
from serving.imaging.decode import decode
from serving.imaging.preprocess import Preprocess
from tests.training.conftest import STAGE, coloured
from training.config import load, schema, sections
from training.data.dataset import load_dataset
from training.engine import best_checkpoint, epoch, finetune, plan
from training.evaluation import evaluate
from training.pixels.decoded import decode_dataset
from training.run import checkpoint
from training.run.folder import create_run_folder
from training.run.history import Epoch
from training.utils import precision
from training.utils.precision import Precision

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
    return finetune.run(
        load.read(path, overrides), str(photos), out=out, device="cpu", log=lines.append
    )


def test_a_run_writes_the_documented_files(recipe, photos, tmp_path, lines):
    path = recipe(STAGE.format(epochs=10))
    learns = ("arch=squeezenet1_1", "arch_args={}", "optimizer.kind=adamw", "stage.all.lr=0.001",
              "data.presize=1.25")  # fmt: skip
    folder = run(path, photos, tmp_path / "runs" / "one", lines, *learns)
    names = {p.name for p in folder.iterdir()}
    assert names == {
        *("recipe.toml", "split.csv", "run.json", "metrics.csv", "steps.csv", "schedule.png"),
        *("best.safetensors", "best.json", "stages", "report.html", "events"),
    }
    assert {p.name for p in (folder / "stages").iterdir()} == {"all.safetensors", "all.json"}
    assert (folder.parent / "latest").resolve() == folder.resolve()
    info = json.loads((folder / "best.json").read_text())
    assert info["classes"] == ["blue", "green", "red"]
    assert info["metrics"]["accuracy"] >= 0.9
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == [str(i) for i in range(1, 11)]
    text = (folder / "recipe.toml").read_text()
    again = load.parse(tomllib.loads(text), "recipe.toml")
    assert again == load.read(path, learns)
    older = text.replace("presize = 1.25\n", "")  # a run of a version without this option
    assert older != text
    assert load.parse(tomllib.loads(older), "recipe.toml") == load.read(path, learns[:-1])


def test_evaluate_reproduces_the_metrics_of_best_json(recipe, photos, tmp_path, lines):
    folder = run(recipe(), photos, tmp_path / "run", lines)
    metrics = checkpoint.read_info(folder / "best.json").metrics
    result = evaluate.evaluate(folder)
    assert result.accuracy == metrics["accuracy"]
    assert result.loss == pytest.approx(metrics["loss"], rel=1e-9)
    with_tta = evaluate.evaluate(folder, tta=sections.TtaConfig(count=4))
    assert (with_tta.views, with_tta.photos) == (4, 9)


def test_the_same_seed_gives_the_same_weights(recipe, photos, tmp_path, lines):
    path = recipe()
    one = run(path, photos, tmp_path / "one", lines)
    two = run(path, photos, tmp_path / "two", lines)
    other = run(path, photos, tmp_path / "other", lines, "seed=5")
    weights = [(folder / checkpoint.BEST).read_bytes() for folder in (one, two, other)]
    assert weights[0] == weights[1] != weights[2]


def test_stages_freeze_pretrained_layers(recipe, photos, tmp_path, lines, weights):
    folder = run(
        recipe(FROZEN.format(views=2)), photos, tmp_path / "run", lines, f"weights={weights}"
    )
    assert (folder / "lr_find-head.png").read_bytes().startswith(b"\x89PNG")
    trained, _ = checkpoint.load(folder)
    start = torch.load(weights)
    assert torch.equal(trained.state_dict()["body.0.0.weight"], start["features.0.0.weight"])


def test_validation_pixels_equal_those_of_the_service(photos):
    settings = schema.Recipe.model_validate(
        {"name": "x", "arch": "resnet18", "stage": [{"name": "s"}], "preprocess": {"size": 24}}
    )
    found = load_dataset(str(photos))
    _, _, valid = decode_dataset(found, settings.preprocess, 1.5, print)
    for sample, row in zip(found.valid, valid.pixels[:], strict=True):
        served = settings.preprocess(decode(sample.path.read_bytes()).image)
        assert (row.numpy() == served).all()


def test_broken_photos_are_listed_counted_and_skipped(recipe, photos, tmp_path, lines):
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


def test_nothing_is_written_if_an_option_is_wrong(recipe, photos, tmp_path, lines):
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
def test_device_cuda_without_a_gpu_is_an_error():
    with pytest.raises(OptionError, match="--device cuda: no usable GPU"):
        precision.choose_precision("cuda", "auto")
    assert precision.choose_precision("auto", "auto").device.type == "cpu"


@pytest.mark.parametrize(
    ("has", "expected"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ({"avx512_bf16": False, "amx_bf16": False, "avx2": True}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_auto_precision_is_bfloat16_on_cpus_with_bfloat16_instructions(monkeypatch, has, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    assert precision.choose_precision("cpu", "auto").dtype == expected
    assert precision.choose_precision("cpu", "fp32").dtype == torch.float32


def test_concurrent_runs_get_different_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [create_run_folder(None, "quick") for _ in range(3)]
    assert [str(f) for f in folders] == ["runs/quick", "runs/quick-2", "runs/quick-3"]


def test_a_validation_loss_that_is_not_finite_ends_the_run(
    recipe, photos, tmp_path, lines, monkeypatch
):
    original = epoch.validate

    def broken(classifier, *rest):
        with torch.no_grad():
            classifier.head[-1].bias.fill_(float("nan"))
        return original(classifier, *rest)

    monkeypatch.setattr(epoch, "validate", broken)
    with pytest.raises(WorkError, match="the validation loss is nan after epoch 1"):
        run(recipe(), photos, tmp_path / "run", lines)
    assert not (tmp_path / "run" / "best.json").exists()


def test_a_full_disk_while_decoding_is_an_error(photos, monkeypatch):
    def full(_file, _start, _size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(WorkError, match=r"decoded photos need .* GB.*No space left.*TMPDIR"):
        decode_dataset(load_dataset(str(photos)), Preprocess(size=32), 1.5, print)


def test_a_diverged_loss_is_an_error_with_stage_step_and_rate(recipe, photos, tmp_path, lines):
    with pytest.raises(WorkError, match=r"stage all: the loss is \w+ at epoch \d, step \d+, rate"):
        run(recipe(), photos, tmp_path / "run", lines, "stage.all.lr=1e30")
    assert lines[-1].endswith(
        f"saved in {tmp_path / 'run'}; start a new run with a lower learning rate"
    )


def test_auto_weights_fall_back_to_random_ones_with_a_warning(recipe, lines, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", _no_network, raising=True
    )
    settings = load.read(recipe(), ["weights=auto", "arch_args={}"])
    _, pretrained = plan.build_classifier(settings, 3, lines.append)
    assert not pretrained
    assert "training from scratch" in lines[0]
    with pytest.raises(DataError, match="can't be downloaded"):
        plan.build_classifier(settings.model_copy(update={"weights": "imagenet"}), 3, lines.append)


def _no_network(*_args, **_options):
    from urllib.error import URLError

    raise URLError("no network")


def test_the_best_epoch_has_the_highest_accuracy_then_the_lowest_loss():
    figures = [(0.5, 1.0), (0.8, 0.7), (0.8, 0.6), (0.7, 0.1), (0.8, 0.65)]
    rows = [Epoch("all", n, 0.1, 1.0, loss, acc, 0.0) for n, (acc, loss) in enumerate(figures)]
    assert max(rows, key=best_checkpoint.rank).epoch == 2


def test_the_best_checkpoint_is_of_the_best_epoch(recipe, photos, tmp_path, lines, monkeypatch):
    figures, biases = iter([(0.5, 1.0), (0.8, 0.7), (0.8, 0.6), (0.7, 0.1), (0.8, 0.65)]), []

    def validate(classifier, *_):
        biases.append(classifier.head[-1].bias.detach().clone())
        return next(figures)

    monkeypatch.setattr(epoch, "validate", validate)
    folder = run(recipe(STAGE.format(epochs=5)), photos, tmp_path / "run", lines)
    kept, info = checkpoint.load(folder)
    assert info.metrics["epoch"] == 3
    assert torch.equal(kept.head[-1].bias, biases[2])
    last, _ = checkpoint.load(folder / "stages" / "all.safetensors")
    assert torch.equal(last.head[-1].bias, biases[4])


def test_early_stopping_ends_a_stage_and_restores_its_best_epoch(
    recipe, photos, tmp_path, lines, monkeypatch
):
    figures, biases = iter([(0.5, 1.0), (0.5, 0.7), (0.6, 0.8), (0.6, 0.9), (0.6, 0.1)]), []

    def validate(classifier, *_):
        biases.append(classifier.head[-1].bias.detach().clone())
        return next(figures)

    monkeypatch.setattr(epoch, "validate", validate)
    folder = run(
        recipe(STAGE.format(epochs=5)), photos, tmp_path / "run", lines, "stage.all.patience=2"
    )
    assert len(biases) == 4
    last, _ = checkpoint.load(folder / "stages" / "all.safetensors")
    assert torch.equal(last.head[-1].bias, biases[1])


def test_accumulated_batches_equal_one_large_batch(recipe, photos, tmp_path, lines):
    """The network has no BatchNorm; gradients are of the mean over all photos of the step."""
    path = recipe(STAGE.format(epochs=1))
    same = ("arch=squeezenet1_1", "arch_args={}", "head.kind=linear", "head.dropout=0",
            "stage.all.lr=0.01", "optimizer.kind=sgd", "batch_size=16")  # fmt: skip
    whole = run(path, photos, tmp_path / "whole", lines, *same)
    parts = run(
        path, photos, tmp_path / "parts", lines, *same, "batch_size=4", "optimizer.accumulate=4"
    )
    states = [
        checkpoint.load(folder / "stages/all.safetensors")[0].state_dict()
        for folder in (whole, parts)
    ]
    for name, value in states[0].items():
        assert torch.allclose(value, states[1][name], rtol=1e-4, atol=1e-6), name


def test_checkpoints_of_progressive_resizing_have_the_size_of_their_stage(
    recipe, photos, tmp_path, lines
):
    stages = """
[[stage]]
name = "small"
lr = 0.01
[[stage]]
name = "large"
lr = 0.01
image_size = 48
"""
    folder = run(recipe(stages), photos, tmp_path / "run", lines)
    sizes = {
        name: checkpoint.read_info(folder / "stages" / f"{name}.json").preprocess.size
        for name in ("small", "large")
    }
    assert sizes == {"small": 32, "large": 48}
    of_stage = evaluate.evaluate(folder / "stages" / "large.safetensors")
    assert (of_stage.photos, of_stage.views) == (9, 1)
    info = checkpoint.read_info(folder / "best.json")
    assert info.preprocess.size == sizes[info.metrics["stage"]]
    assert evaluate.evaluate(folder).accuracy == info.metrics["accuracy"]


def test_gradual_unfreezing_adds_one_group_per_stage(recipe, tmp_path):
    stages = "".join(
        f'[[stage]]\nname = "s{n}"\nunfreeze = {u}\n'
        for n, u in enumerate(["0", *['"gradual"'] * 3])
    )
    planned = plan.stages_of(load.read(recipe(stages)), pretrained=True)
    assert [stage.unfreeze for stage in planned] == [0, 1, 2, 3]
    scratch = plan.stages_of(load.read(recipe(stages)), pretrained=False)
    assert {stage.unfreeze for stage in scratch} == {schema.ALL}
    with pytest.raises(
        OptionError, match=r"must be a number of groups: set stage\.s0\.unfreeze = 1"
    ):
        plan.stages_of(
            load.read(recipe(stages.replace("unfreeze = 0", 'unfreeze = ["18"]'))),
            pretrained=True,
        )


def test_steps_csv_has_every_step(recipe, photos, tmp_path, lines):
    path = recipe(STAGE.format(epochs=2) + 'schedule = "one_cycle"\nmomentum_low = 0.8\n')
    folder = run(path, photos, tmp_path / "run", lines)
    with (folder / "steps.csv").open() as file:
        rows = list(csv.DictReader(file))
    photos_to_train_on = 36
    assert len(rows) == 2 * -(-photos_to_train_on // 8)
    top = max(rows, key=lambda row: float(row["lr"].split()[-1]))
    assert float(top["momentum"]) == min(float(row["momentum"]) for row in rows)
    assert float(rows[-1]["lr"].split()[-1]) < 0.02
    assert (folder / "schedule.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_options_of_a_later_stage_are_errors_at_the_start(
    recipe, photos, tmp_path, lines, weights
):
    for override, message in (
        ("stage.all.lr=[0.1,0.2]", "lr has 2 rates"),
        ('stage.all.unfreeze=["nonsense*"]', "nonsense"),
    ):
        with pytest.raises(OptionError, match=message):
            run(recipe(), photos, tmp_path / "run", lines, override, f"weights={weights}")
    assert not (tmp_path / "run").exists()


@pytest.mark.process
def test_a_second_run_in_the_folder_of_the_photos_learns_nothing_that_fledge_made(
    recipe, tmp_path, monkeypatch, capsys
):
    """`--data .` twice, after preview, lr-find, score and export in that folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = coloured(tmp_path / "photos", {"blue": 15, "green": 15})
    for name in ("@eaDir", "#recycle"):
        coloured(folder / "blue" / name, {"0.jpg": 3})
        coloured(folder / name, {"0.jpg": 3})
    path = str(recipe())
    monkeypatch.chdir(folder)
    fingerprints = []
    for _ in range(2):
        assert fledge.main(["preview", "."]) == 0
        assert fledge.main(["preview", ".", "--augment"]) == 0
        assert fledge.main(["lr-find", path, "--data", ".", "--device", "cpu"]) == 0
        assert fledge.main(["train", path, "--data", ".", "--device", "cpu"]) == 0
        err = capsys.readouterr().err
        assert "photos: a folder per class, 2 classes" in err
        assert "files and folders of systems and tools (#recycle 2, @eaDir 2)" in err
        info = json.loads(Path("runs/latest/best.json").read_text())
        assert info["classes"] == ["blue", "green"]
        fingerprints.append(info["data"]["fingerprint"])
        words = ["export", "runs/latest", "--out", "bundle", "--precision", "fp32"]
        assert fledge.main(words) == 0
        words = ["score", ".", "--bundle", "bundle", "--out", "s.csv", "--device", "cpu"]
        assert fledge.main(words) == 0
        assert "scored: 30 (" in capsys.readouterr().out
    assert fingerprints[0] == fingerprints[1]
