"""torchvision checkpoints: loaded without executing code, exported, compared."""

import argparse
import pickle

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file

import fledge
from export import benchmark, torchvision_checkpoint
from export.graph import assemble
from serving.errors import DataError, OptionError
from serving.imaging import decode
from serving.imaging.preprocess import Preprocess
from serving.inference.load import open_predictor
from tests.export.conftest import SMALL, pixels, rates
from tests.support.random_batchnorms import randomise_batchnorms
from training.models.classifier import normalise

LABELS = ["green", "unseen", "blue", "red"]
PREPROCESS = Preprocess(size=64)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    made = torchvision.models.mobilenet_v2(num_classes=4, **SMALL)
    x = normalise(pixels(16, 64), PREPROCESS)
    randomise_batchnorms(made, x)
    with torch.no_grad():
        logits = made(x)
        last = made.classifier[-1]
        last.weight.div_(logits.std())
        last.bias.sub_(logits.mean(dim=0)).div_(logits.std())
    return made.eval()


@pytest.fixture
def labels(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_text("\n".join(LABELS) + "\n\n")
    return path


@pytest.fixture
def file(network, tmp_path):
    path = tmp_path / "mine.pth"
    torch.save(network.state_dict(), path)
    return path


def load(path, arch="mobilenet_v2", labels=LABELS, size=64):
    args = SMALL if arch == "mobilenet_v2" else {}
    return torchvision_checkpoint.load(path, arch, labels, size=size, arch_args=args)


@pytest.mark.parametrize("kind", ["plain", "reference", "lightning", "ddp", "safetensors"])
def test_the_usual_file_formats_are_read(network, tmp_path, kind):
    state = network.state_dict()
    path = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.pth")
    if kind == "safetensors":
        save_file(state, path)
    else:
        options = argparse.Namespace(lr=0.1)
        wrapped = {
            "plain": state,
            "reference": {"model": state, "args": options, "epoch": 3, "optimizer": {}},
            "lightning": {"state_dict": state, "epoch": 3},
            "ddp": {f"module.{key}": value for key, value in state.items()},
        }
        torch.save(wrapped[kind], path)
    loaded, info = load(path)
    x = normalise(pixels(3, 64, seed=1), PREPROCESS)
    with torch.no_grad():
        assert torch.equal(loaded(x), network(x))
        assert loaded.features(x).shape == (3, 1280)
    assert (info.name, info.arch, info.classes) == ("x", "mobilenet_v2", tuple(LABELS))
    assert (info.preprocess.size, info.preprocess.crop) == (64, 0.875)
    assert (info.preprocess.decode, info.preprocess.fit) == ("scaled", "crop")


@pytest.mark.parametrize(
    "arch",
    [
        *("mobilenet_v3_small", "densenet121", "googlenet", "squeezenet1_1"),
        *(
            pytest.param(arch, marks=pytest.mark.slow)
            for arch in ("vgg11_bn", "swin_t", "vit_b_32")
        ),
    ],
)
def test_networks_of_other_families_give_the_same_outputs_after_loading(arch, tmp_path):
    torch.manual_seed(0)
    options = {"init_weights": False} if arch == "googlenet" else {}
    made = torchvision.models.get_model(arch, weights=None, num_classes=4, **options).eval()
    torch.save(made.state_dict(), tmp_path / "x.pth")
    size = 224 if arch == "vit_b_32" else 64
    loaded, _ = load(tmp_path / "x.pth", arch, size=size)
    x = normalise(pixels(2, size), PREPROCESS)
    with torch.no_grad():
        assert torch.equal(loaded(x), made(x))
        graph, _ = assemble(loaded, Preprocess(size=size))
        logits, features = graph(pixels(2, size))
    assert torch.allclose(logits, made(x), rtol=1e-4, atol=1e-5)
    assert features.ndim == 2


def test_arguments_of_the_builder_are_used_and_checked(tmp_path):
    torch.manual_seed(0)
    made = torchvision.models.googlenet(num_classes=4, init_weights=False).eval()
    torch.save(made.state_dict(), tmp_path / "x.pth")
    args = torchvision_checkpoint.read_args(["transform_input=true"])
    loaded, info = torchvision_checkpoint.load(
        tmp_path / "x.pth", "googlenet", LABELS, size=64, arch_args=args
    )
    assert info.arch_args == {"transform_input": True}
    made.transform_input = True
    x = normalise(pixels(2, 64), PREPROCESS)
    with torch.no_grad():
        assert torch.equal(loaded(x), made(x))
    with pytest.raises(OptionError, match=r"--arch-args .*wings.* does not fit googlenet"):
        torchvision_checkpoint.load(tmp_path / "x.pth", "googlenet", LABELS, arch_args={"wings": 2})
    args = torchvision_checkpoint.read_args(
        ["transform_input=False"]
    )  # a text, in TOML as in the shell
    with pytest.raises(OptionError, match="transform_input=False: use true or false"):
        torchvision_checkpoint.load(
            tmp_path / "x.pth", "googlenet", LABELS, size=64, arch_args=args
        )
    torch.save({"encoder.pos_embedding": torch.zeros(1, 5, 768)}, tmp_path / "vit.pth")
    for wrong in ({"wings": 2}, {"num_classes": 4}, {"weights": "DEFAULT"}):
        args = {"image_size": 64, **wrong}
        with pytest.raises(OptionError, match=r"--arch-args .* does not fit vit_b_32"):
            torchvision_checkpoint.load(tmp_path / "vit.pth", "vit_b_32", LABELS, arch_args=args)
    with pytest.raises(OptionError, match="--arch-args wings: use KEY=VALUE"):
        torchvision_checkpoint.read_args(["wings"])


@pytest.fixture
def words(labels, shared_run):
    """Options of `fledge export` for the network."""
    given = ["--arch", "mobilenet_v2", "--labels", labels, "--photos", shared_run.photos]
    given += ["--arch-args", *(f"{key}={value}" for key, value in SMALL.items())]
    return ["export", *map(str, given), "--size", "64"]


def test_the_bundle_gives_the_network_s_answers(
    network, file, words, shared_run, tmp_path, monkeypatch, recorded_exporters
):
    monkeypatch.setattr(benchmark, "measure", rates)
    out = tmp_path / "bundle"
    words += ["--checkpoint", str(file), "--precision", "fp32", "--out", str(out)]
    assert fledge.main(words) == 0
    predictor = open_predictor(out, device="cpu")
    manifest = predictor.manifest
    assert (manifest.name, manifest.labels) == ("mine", tuple(LABELS))
    assert manifest.parity["photos"] == 27  # of 42, two thirds of each class
    assert manifest.provenance["run"] == "mine.pth"
    assert str(tmp_path) not in manifest.to_json()
    photo = next(shared_run.photos.glob("*/*.jpg")).read_bytes()
    prepared = predictor.prepare(photo)
    with torch.no_grad():
        x = normalise(torch.from_numpy(prepared.pixels.copy()), PREPROCESS)
        expected = (network(x).double() / manifest.temperature).softmax(1).numpy()
    answer = predictor.predict([prepared])[0].probabilities
    assert np.abs(answer - expected[0]).max() <= 1e-4


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--crop", "0"], "--crop 0.0: use a share"),
        (["--size", "0"], "--size 0: use 8 to 4096"),
        (["--accuracy-budget", "nan"], "--accuracy-budget nan: use points"),
        (["--accuracy-budget", "-1"], "--accuracy-budget -1: use points"),
    ],
)
def test_an_invalid_number_is_refused_before_the_export(
    file, words, tmp_path, capsys, given, message
):
    words += ["--checkpoint", str(file), "--out", str(tmp_path / "b"), *given]
    assert fledge.main(words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_a_network_no_better_than_the_most_common_class_gets_a_warning(
    network, file, labels, words, shared_run, tmp_path, monkeypatch, capsys, recorded_exporters
):
    def right(order):
        """The number of held-out photos that the network classifies correctly."""
        _, held_out = torchvision_checkpoint.photos(shared_run.photos, order)
        squares = [PREPROCESS(decode.read(path).image) for path, _ in held_out]
        with torch.no_grad():
            logits = network(normalise(torch.from_numpy(np.stack(squares)), PREPROCESS))
        truth = torch.tensor([label for _, label in held_out])
        return (logits.argmax(dim=1) == truth).sum()

    monkeypatch.setattr(benchmark, "measure", rates)
    # A photo is right in one of these orders, so that in one of them at most a quarter is right.
    orders = [LABELS[start:] + LABELS[:start] for start in range(len(LABELS))]
    labels.write_text("\n".join(min(orders, key=right)))
    words += ["--checkpoint", str(file), "--precision", "fp32", "--out", str(tmp_path / "b")]
    assert fledge.main(words) == 0
    assert "are the labels in the order of the logits?" in capsys.readouterr().out


def test_a_pickle_with_code_is_refused(tmp_path, capsys):
    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps({"fc.weight": Evil()}))
    with pytest.raises(DataError, match=r"--checkpoint .*evil\.pth' is not a state dict"):
        load(path)
    torch.save({"fc.weight": Evil()}, path)
    with pytest.raises(DataError, match="is not a state dict"):
        load(path)
    assert "code ran" not in capsys.readouterr().out


def test_the_error_for_a_checkpoint_of_another_network_names_the_mismatch(file, tmp_path):
    with pytest.raises(DataError, match=r"has 4 classes and --labels 3"):
        load(file, labels=LABELS[:3])
    with pytest.raises(DataError, match=r"is not for mnasnet0_5: it lacks layers\.0\.weight"):
        load(file, "mnasnet0_5")
    with pytest.raises(DataError, match="no such file"):
        load(tmp_path / "nothing.pth")
    with pytest.raises(OptionError, match="did you mean 'resnet18'"):
        load(file, "resnet19")
    with pytest.raises(OptionError, match="--size = 8 does not fit vgg11"):
        load(file, "vgg11", size=8)
    torch.save(torchvision.models.squeezenet1_1(num_classes=5).state_dict(), file)
    with pytest.raises(DataError, match=r"has 5 classes and --labels 4"):
        load(file, "squeezenet1_1")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is empty"),
        ("a\n\nb", "line 2 holds nothing"),
        ("a\nb\na", "line 3 holds 'a' a second"),
    ],
)
def test_invalid_label_files_are_refused(tmp_path, text, why):
    path = tmp_path / "labels.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=why):
        torchvision_checkpoint.read_labels(path)
    with pytest.raises(DataError, match="No such file"):
        torchvision_checkpoint.read_labels(tmp_path / "nothing")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_labels_that_an_editor_of_windows_saved_are_read(tmp_path, encoding, end):
    path = tmp_path / "labels.txt"
    path.write_bytes(end.join([" ants", "cafe\u0301 ", "", ""]).encode(encoding))
    assert torchvision_checkpoint.read_labels(path) == ["ants", "caf\xe9"]


def test_all_mistakes_of_the_labels_are_told_together(tmp_path):
    path = tmp_path / "labels.txt"
    path.write_bytes("caf\xe9\n\ncafe\u0301\nx\nx\n".encode() + b"\xff\n")
    with pytest.raises(DataError) as refused:
        torchvision_checkpoint.read_labels(path)
    assert str(refused.value).split("\n  ") == [
        f"--labels {path} has 4 mistakes:",
        "line 2 holds nothing",
        r"line 3 holds 'caf\xe9' a second time, after line 1",
        "line 5 holds 'x' a second time, after line 4",
        "line 6 is not UTF-8 text",
        "write each class name once, one per line",
    ]


def test_a_folder_that_is_no_label_is_named(shared_run):
    with pytest.raises(DataError, match=r"'red' is no label .* such as 'ready'$"):
        torchvision_checkpoint.photos(shared_run.photos, ["blue", "green", "ready"])


def test_folders_that_only_look_like_a_label_are_of_it(shared_run):
    labels = ["Blue ", "GREEN", "RED"]
    calibrate, held_out = torchvision_checkpoint.photos(shared_run.photos, labels)
    folders = {path.parent.name: labels[label] for path, label in calibrate + held_out}
    assert folders == {"blue": "Blue ", "green": "GREEN", "red": "RED"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a run, as runs/latest"),
        (["run", "--arch", "resnet18"], "--arch goes with --checkpoint"),
        (["--checkpoint", "x.pth"], "--checkpoint x.pth needs --arch, too"),
        (
            ["run", *["--checkpoint", "x", "--arch", "a", "--labels", "b", "--photos", "c"]],
            "--checkpoint replaces a run",
        ),
    ],
)
def test_missing_and_contradicting_options_are_refused(words, message, tmp_path, capsys):
    assert fledge.main(["export", *words, "--out", str(tmp_path / "b")]) == 2
    assert message in capsys.readouterr().err
