"""Settings from environment variables."""

from pathlib import Path

import pytest

from serving.errors import OptionError
from serving.settings import Settings
from serving.utils.cpu import cores


def test_unset_and_empty_variables_give_the_defaults():
    assert Settings.from_env({}) == Settings()
    assert Settings.from_env({"FLEDGE_DEVICE": "", "FLEDGE_MAX_BATCH": " "}) == Settings()


def test_the_default_bundle_is_in_the_current_folder_or_beside_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    bento, here = tmp_path / "bento", tmp_path / "here"
    for folder in (bento, here):
        folder.mkdir()
    monkeypatch.setattr("serving.settings.__file__", str(bento / "serving" / "settings.py"))
    monkeypatch.chdir(here)
    assert Settings.from_env({}).bundle == Path("bundle")
    (bento / "bundle").mkdir()
    assert Settings.from_env({}).bundle == bento / "bundle"
    assert Settings.from_env({"FLEDGE_BUNDLE": "b"}).bundle == Path("b")
    (here / "bundle").mkdir()
    assert Settings.from_env({}).bundle == Path("bundle")
    (tmp_path / "bento.yaml").touch()  # BENTO/bento.yaml, BENTO/src/bundle
    assert Settings.from_env({}).bundle == bento / "bundle"


def test_every_variable_is_read(tmp_path: Path):
    keys = tmp_path / "keys"
    keys.write_text("# ours\nfirst\n\nsecond\n")
    settings = Settings.from_env(
        {
            "FLEDGE_BUNDLE": "b",
            "FLEDGE_DEVICE": "cpu",
            "FLEDGE_PRECISION": "int8",
            "FLEDGE_RUNTIME": "torchscript",
            "FLEDGE_WORKERS": "2",
            "FLEDGE_MAX_BATCH": "8",
            "FLEDGE_MAX_QUEUE": "9",
            "FLEDGE_MAX_BYTES": "5000",
            "FLEDGE_MAX_PIXELS": "6000",
            "FLEDGE_DEADLINE": "0.5",
            "FLEDGE_LOAD_TIMEOUT": "7",
            "FLEDGE_API_KEYS_FILE": str(keys),
            "FLEDGE_MAX_CONNECTIONS": "77",
            "FLEDGE_HOSTS": "A.example, b.example",
            "FLEDGE_CORS_ORIGINS": "https://a.example *",
            "FLEDGE_TLS_CERT": "cert.pem",
            "FLEDGE_TLS_KEY": "key.pem",
            "FLEDGE_KEY_RATE": "2.5",
        }
    )
    assert settings.bundle == Path("b")
    assert settings.runtime == "torchscript"
    assert (settings.device, settings.precision) == ("cpu", "int8")
    assert (settings.workers, settings.max_batch, settings.max_queue) == (2, 8, 9)
    assert (settings.max_bytes, settings.max_pixels, settings.deadline) == (5000, 6000, 0.5)
    assert len(settings.api_keys) == 2
    assert settings.load_timeout == 7
    assert Settings.from_env({}).load_timeout is None
    assert (settings.max_connections, settings.key_rate) == (77, 2.5)
    assert settings.hosts == {"a.example", "b.example"}
    assert settings.cors_origins == {"https://a.example", "*"}
    assert (settings.tls_cert, settings.tls_key) == (Path("cert.pem"), Path("key.pem"))


def test_all_errors_are_reported_at_once(tmp_path: Path):
    empty = tmp_path / "keys"
    empty.write_text("# none\n")
    wrong = {
        "FLEDGE_DEVICE": "tpu",
        "FLEDGE_PRECISION": "fp8",
        "FLEDGE_WORKERS": "0",
        "FLEDGE_MAX_BATCH": "many",
        "FLEDGE_MAX_QUEUE": "-1",
        "FLEDGE_MAX_BYTES": "1e6",
        "FLEDGE_MAX_PIXELS": "٣٠٠",
        "FLEDGE_DEADLINE": "nan",
        "FLEDGE_MAX_CONNECTIONS": "0",
        "FLEDGE_HOSTS": "http://a",
        "FLEDGE_CORS_ORIGINS": "a",
        "FLEDGE_TLS_CERT": "cert.pem",
        "FLEDGE_KEY_RATE": "inf",
        "FLEDGE_API_KEYS_FILE": str(empty),
        "FLEDGE_TRUSTED_KEYS": "somewhere",
    }
    with pytest.raises(OptionError) as caught:
        Settings.from_env(wrong)
    message = str(caught.value)
    assert [name for name in wrong if name not in message] == []
    assert "\n" not in message


def test_a_number_of_many_digits_is_a_wrong_value():
    with pytest.raises(OptionError, match="FLEDGE_WORKERS") as caught:
        Settings.from_env({"FLEDGE_WORKERS": "1" * 5000})
    assert len(str(caught.value)) < 200


def test_a_missing_key_file_is_an_error():
    with pytest.raises(OptionError, match="FLEDGE_API_KEYS_FILE"):
        Settings.from_env({"FLEDGE_API_KEYS_FILE": "/no/such/file"})


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("FLEDGE_API_KEY", "FLEDGE_API_KEYS_FILE"),
        ("FLEDGE_API_KEY_FILE", "FLEDGE_API_KEYS_FILE"),
        ("FLEDGE_MAX_QEUE", "FLEDGE_MAX_QUEUE"),
        ("FLEDGE_TRUSTED", "FLEDGE_TRUSTED_KEYS"),
    ],
)
def test_a_misspelt_variable_is_refused_with_the_nearest_name(name, meant):
    with pytest.raises(OptionError, match=rf"{name}: no such variable; did you mean {meant}\?"):
        Settings.from_env({name: "8"})


@pytest.mark.parametrize(
    "name",
    [
        *("PORT", "SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT_3000_TCP_ADDR"),
        *("DB_PORT", "BUNDLE_PORT", "BUNDLE_PORT_80_TCP", "DEVICE_SERVICE_HOST"),
        *(
            "BUNDLE_DIR",
            "CACHE",
            "CACHE_GB",
            "CACHE_DIR",
            "IMAGE",
            "IMAGE_TAG",
            "VERSION",
            "PHOTOS",
        ),
    ],
)
def test_unrelated_variables_are_ignored(name):
    assert Settings.from_env({f"FLEDGE_{name}": "1"}) == Settings.from_env({})


def test_an_empty_variable_with_an_unknown_name_is_ignored():
    assert Settings.from_env({"FLEDGE_WORKER": " "}) == Settings.from_env({})


def test_workers_share_the_cores():
    assert cores() >= 1
    assert Settings(workers=10_000).threads == 1
    assert Settings(workers=1).threads == cores()
