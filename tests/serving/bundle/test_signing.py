"""Signatures by keys that openssl makes; only bundles signed by trusted keys are read."""

import base64
import shutil
import subprocess
from pathlib import Path

import pytest

from serving.bundle import signing, storage
from serving.bundle.inspect import describe
from serving.errors import BundleError, OptionError
from serving.inference.load import open_predictor, verify
from tests.support.tiny_bundle import tiny_bundle


class Key:
    """A key pair in two PEM files."""

    def __init__(self, folder: Path, name: str, kind: str = "ed25519") -> None:
        self.private, self.public = folder / f"{name}.pem", folder / f"{name}.pub"
        openssl("genpkey", "-algorithm", kind, "-out", self.private)
        openssl("pkey", "-in", self.private, "-pubout", "-out", self.public)


def openssl(*arguments: str | Path) -> str:
    command = ["openssl", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> list[Key]:
    folder = tmp_path_factory.mktemp("keys")
    return [Key(folder, name) for name in ("ours", "theirs")]


@pytest.fixture
def trust(monkeypatch: pytest.MonkeyPatch):
    return lambda path: monkeypatch.setenv(signing.TRUSTED, str(path))


def signed(folder: Path, key: Key, seed: int = 0) -> Path:
    """A bundle and its signature."""
    tiny_bundle(folder, seed=seed)
    storage.publish(storage.read(folder).manifest, folder, signing.signer(key.private))
    return folder


def test_a_bundle_with_a_trusted_signature_is_read_and_names_the_key(tmp_path, keys, trust) -> None:
    folder = signed(tmp_path / "b", keys[0])
    trust(keys[0].public)
    (signer,) = storage.read(folder).signers
    assert f"signed by {signer}" in verify(folder)
    assert any(line.endswith(f"by {signer}") for line in describe(folder))


def test_a_signature_by_any_trusted_key_is_accepted(tmp_path, keys, trust) -> None:
    both = tmp_path / "both.pem"
    both.write_text(keys[1].public.read_text() + keys[0].public.read_text())
    trust(both)
    for key in keys:
        assert len(storage.read(sign_without_reading(tmp_path / "b", key)).signers) == 1


def test_openssl_verifies_the_signature(tmp_path, keys) -> None:
    folder = signed(tmp_path / "b", keys[0])
    line = (folder / storage.SIGNATURE).read_text().split()
    (tmp_path / "raw").write_bytes(base64.b64decode(line[2]))
    options = ["-rawin", "-in", folder / storage.MANIFEST, "-sigfile", tmp_path / "raw"]
    output = openssl("pkeyutl", "-verify", "-pubin", "-inkey", keys[0].public, *options)
    assert "Signature Verified Successfully" in output


def test_without_trusted_keys_a_signature_is_still_checked(tmp_path, keys, monkeypatch) -> None:
    monkeypatch.delenv(signing.TRUSTED, raising=False)
    folder = signed(tmp_path / "b", keys[0])
    assert len(storage.read(folder).signers) == 1
    other = signed(tmp_path / "other", keys[0], seed=1)
    shutil.copy(other / storage.SIGNATURE, folder)
    with pytest.raises(
        BundleError, match=r"manifest\.sig: it has no valid signature of this manifest"
    ):
        storage.read(folder)


def test_bundles_without_a_signature_or_by_another_key_are_refused(tmp_path, keys, trust) -> None:
    trust(keys[0].public)
    with pytest.raises(BundleError, match=r"manifest\.sig: it is not signed.*--sign"):
        storage.read(tiny_bundle(tmp_path / "a"))
    with pytest.raises(
        BundleError, match=r"manifest\.sig: key [0-9a-f]{16} signed it, which is not in"
    ):
        storage.read(sign_without_reading(tmp_path / "b", keys[1]))


def sign_without_reading(folder: Path, key: Key) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(signing.TRUSTED)
        return signed(folder, key)


def test_a_changed_manifest_with_a_matching_checksum_is_refused(tmp_path, keys, trust) -> None:
    folder = signed(tmp_path / "b", keys[0])
    trust(keys[0].public)
    path = folder / storage.MANIFEST
    text = path.read_text()
    path.write_text(text.replace('"daisy"', '"thorn"'))
    (folder / storage.CHECKSUM).write_text(f"{storage.sha256(path)}  {storage.MANIFEST}\n")
    with pytest.raises(
        BundleError, match=r"manifest\.sig: it has no valid signature of this manifest"
    ):
        storage.read(folder)


@pytest.mark.parametrize("at", [0, 9, 60, 100])
def test_a_changed_signature_is_refused(tmp_path, keys, trust, at) -> None:
    folder = signed(tmp_path / "b", keys[0])
    trust(keys[0].public)
    path = folder / storage.SIGNATURE
    text = path.read_text()
    path.write_text(text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :])
    with pytest.raises(BundleError, match=r"manifest\.sig"):
        storage.read(folder)


def test_an_unsigned_version_removes_the_old_signature(tmp_path, keys) -> None:
    folder = signed(tmp_path / "b", keys[0])
    tiny_bundle(folder, seed=1)
    assert storage.read(folder).signers == ()
    assert not (folder / storage.SIGNATURE).exists()


class Killed(BaseException):
    """Simulates kill -9: it is not an Exception, so no handler in the code catches it."""


@pytest.mark.parametrize("step", range(4))
def test_a_kill_during_the_first_signed_publish_breaks_nothing(
    tmp_path, keys, monkeypatch, step
) -> None:
    folder = tiny_bundle(tmp_path / "b")
    old = storage.read(folder).manifest
    new = old.model_copy(update={"tuning": {"cpu": {"max_batch": 2}}})
    replace_file, calls = storage._replace, []

    def killed(path: Path, data: bytes) -> None:
        if len(calls) == step:
            raise Killed
        calls.append(path.name)
        replace_file(path, data)
        assert storage.read(folder).manifest in (old, new)

    monkeypatch.setattr(storage, "_replace", killed)
    with pytest.raises(Killed):
        storage.publish(new, folder, signing.signer(keys[0].private))
    monkeypatch.undo()
    assert storage.read(folder).manifest == (new if step >= 2 else old)


def test_a_file_swapped_after_the_check_is_not_served(tmp_path, keys, trust, monkeypatch) -> None:
    folder = signed(tmp_path / "b", keys[0])
    other = tiny_bundle(tmp_path / "other", seed=1)
    trust(keys[0].public)
    verify_files = storage._verify_files

    def swapped(opened: storage.Bundle) -> None:
        verify_files(opened)
        foreign = next(other.glob("*/model.onnx"))
        (opened.payload / "model.onnx").write_bytes(foreign.read_bytes())

    monkeypatch.setattr(storage, "_verify_files", swapped)
    with pytest.raises(BundleError, match=r"model\.onnx was changed after export"):
        open_predictor(folder, device="cpu")


def test_signers_are_marked_as_not_verified_without_trusted_keys(
    tmp_path, keys, monkeypatch
) -> None:
    monkeypatch.delenv(signing.TRUSTED, raising=False)
    folder = signed(tmp_path / "b", keys[0])
    assert any("not verified: FLEDGE_TRUSTED_KEYS is not set" in line for line in verify(folder))
    assert "not verified" in "\n".join(describe(folder))


@pytest.mark.parametrize("step", range(5))
def test_a_kill_during_a_signed_publish_leaves_the_old_or_the_new_version(
    tmp_path, keys, trust, monkeypatch, step
) -> None:
    folder = signed(tmp_path / "b", keys[0])
    trust(keys[0].public)
    old = storage.read(folder).manifest
    new = old.model_copy(update={"tuning": {"cpu": {"max_batch": 2}}})
    replace_file, calls = storage._replace, []

    def killed(path: Path, data: bytes) -> None:
        if len(calls) == step:
            raise Killed
        calls.append(path.name)
        replace_file(path, data)

    monkeypatch.setattr(storage, "_replace", killed)
    with pytest.raises(Killed):
        storage.publish(new, folder, signing.signer(keys[0].private))
    monkeypatch.undo()
    trust(keys[0].public)
    assert storage.read(folder).manifest == (new if step >= 3 else old)
    assert storage.read(folder).signers


def test_unusable_keys_are_one_line_errors(tmp_path, keys) -> None:
    rsa = Key(tmp_path, "rsa", "rsa")
    locked = tmp_path / "locked.pem"
    openssl("pkey", "-in", keys[0].private, "-aes256", "-passout", "pass:x", "-out", locked)
    (tmp_path / "noise").write_bytes(bytes(range(256)))
    (tmp_path / "empty").write_text("")
    private = {
        rsa.private: "no Ed25519 private key",
        keys[0].public: "no Ed25519 private key",
        locked: "is encrypted",
        tmp_path / "noise": "not a PEM file",
        tmp_path / "empty": "no Ed25519 private key",
        tmp_path / "none": "No such file",
        tmp_path: "Is a directory",
    }
    for path, words in private.items():
        with pytest.raises(OptionError, match=rf"^--sign [^\n]*{words}[^\n]*$"):
            signing.signer(path)
    for path in (rsa.public, keys[0].private, tmp_path / "noise", tmp_path / "empty", tmp_path):
        with pytest.raises(OptionError, match=rf"^{signing.TRUSTED} [^\n]*$"):
            signing.trusted({signing.TRUSTED: str(path)})
    for empty in ("", " "):  # a missing secret must not disable the check
        with pytest.raises(OptionError, match="is set and empty"):
            signing.trusted({signing.TRUSTED: empty})
    # One unreadable key among readable ones is an error: the others alone may not be enough.
    mixed = tmp_path / "mixed.pem"
    mixed.write_text(keys[0].public.read_text() + rsa.public.read_text())
    with pytest.raises(OptionError, match="nothing else"):
        signing.trusted({signing.TRUSTED: str(mixed)})
    truncated = tmp_path / "truncated.pem"
    truncated.write_text(keys[0].public.read_text() + keys[1].public.read_text()[:-10])
    with pytest.raises(OptionError, match="a key in it is incomplete"):
        signing.trusted({signing.TRUSTED: str(truncated)})
