"""Signed by keys that openssl makes: who is trusted reads, nobody else does."""

import base64
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from serving.bundle import signing, storage
from serving.bundle.inspect import describe
from serving.errors import BundleError, OptionError
from serving.inference.load import open_predictor
from serving.inference.verify import verify
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


def test_a_trusted_signature_reads_and_is_told(tmp_path, keys, trust) -> None:
    folder = signed(tmp_path / "b", keys[0])
    trust(keys[0].public)
    (signer,) = storage.read(folder).signers
    assert f"signed by {signer}" in verify(folder)
    assert any(line.endswith(f"by {signer}") for line in describe(folder))


def test_any_of_several_trusted_keys_will_do(tmp_path, keys, trust) -> None:
    both = tmp_path / "both.pem"
    both.write_text(keys[1].public.read_text() + keys[0].public.read_text())
    trust(both)
    for key in keys:
        assert len(storage.read(signed_unread(tmp_path / "b", key)).signers) == 1


def test_openssl_itself_finds_the_signature_right(tmp_path, keys) -> None:
    folder = signed(tmp_path / "b", keys[0])
    line = (folder / storage.SIGNATURE).read_text().split()
    (tmp_path / "raw").write_bytes(base64.b64decode(line[2]))
    options = ["-rawin", "-in", folder / storage.MANIFEST, "-sigfile", tmp_path / "raw"]
    said = openssl("pkeyutl", "-verify", "-pubin", "-inkey", keys[0].public, *options)
    assert "Signature Verified Successfully" in said


def test_without_trusted_keys_a_signature_is_still_checked(tmp_path, keys, monkeypatch) -> None:
    monkeypatch.delenv(signing.TRUSTED, raising=False)
    folder = signed(tmp_path / "b", keys[0])
    assert len(storage.read(folder).signers) == 1
    other = signed(tmp_path / "other", keys[0], seed=1)
    shutil.copy(other / storage.SIGNATURE, folder)
    with pytest.raises(BundleError, match=r"manifest\.sig: no signature in it is of this manifest"):
        storage.read(folder)


def test_nobody_s_and_a_stranger_s_bundles_are_refused(tmp_path, keys, trust) -> None:
    trust(keys[0].public)
    with pytest.raises(BundleError, match=r"manifest\.sig: nobody signed it.*--sign"):
        storage.read(tiny_bundle(tmp_path / "a"))
    with pytest.raises(BundleError, match=r"manifest\.sig: key [0-9a-f]{16} signed it, which is"):
        storage.read(signed_unread(tmp_path / "b", keys[1]))


def signed_unread(folder: Path, key: Key) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(signing.TRUSTED)
        return signed(folder, key)


def test_a_forger_who_mends_the_checksum_is_found_out(tmp_path, keys, trust) -> None:
    folder = signed(tmp_path / "b", keys[0])
    trust(keys[0].public)
    path = folder / storage.MANIFEST
    text = path.read_text()
    path.write_text(text.replace('"daisy"', '"thorn"'))
    (folder / storage.CHECKSUM).write_text(f"{storage.sha256(path)}  {storage.MANIFEST}\n")
    with pytest.raises(BundleError, match=r"manifest\.sig: no signature in it is of this manifest"):
        storage.read(folder)


@pytest.mark.parametrize("at", [0, 9, 60, 100])
def test_a_changed_signature_is_none(tmp_path, keys, trust, at) -> None:
    folder = signed(tmp_path / "b", keys[0])
    trust(keys[0].public)
    path = folder / storage.SIGNATURE
    text = path.read_text()
    path.write_text(text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :])
    with pytest.raises(BundleError, match=r"manifest\.sig"):
        storage.read(folder)


def test_an_unsigned_version_takes_the_old_signature_away(tmp_path, keys) -> None:
    folder = signed(tmp_path / "b", keys[0])
    tiny_bundle(folder, seed=1)
    assert storage.read(folder).signers == ()
    assert not (folder / storage.SIGNATURE).exists()


class Killed(BaseException):
    """Nothing tidies up after it."""


@pytest.mark.parametrize("step", range(4))
def test_the_first_signature_killed_anywhere_breaks_nothing(
    tmp_path, keys, monkeypatch, step
) -> None:
    folder = tiny_bundle(tmp_path / "b")
    old = storage.read(folder).manifest
    new = replace(old, tuning={"cpu": {"max_batch": 2}})
    whole, calls = storage._replace, []

    def killed(path: Path, data: bytes) -> None:
        if len(calls) == step:
            raise Killed
        calls.append(path.name)
        whole(path, data)
        assert storage.read(folder).manifest in (old, new)

    monkeypatch.setattr(storage, "_replace", killed)
    with pytest.raises(Killed):
        storage.publish(new, folder, signing.signer(keys[0].private))
    monkeypatch.undo()
    assert storage.read(folder).manifest == (new if step >= 2 else old)


def test_what_is_served_is_what_was_signed(tmp_path, keys, trust, monkeypatch) -> None:
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


def test_whose_key_it_is_nobody_vouches_for_unless_it_is_named(tmp_path, keys, monkeypatch) -> None:
    monkeypatch.delenv(signing.TRUSTED, raising=False)
    folder = signed(tmp_path / "b", keys[0])
    assert any("nobody vouches for: FLEDGE_TRUSTED_KEYS is not set" in x for x in verify(folder))
    assert "nobody vouches for" in "\n".join(describe(folder))


@pytest.mark.parametrize("step", range(5))
def test_a_signed_publish_killed_anywhere_reads_as_old_or_new(
    tmp_path, keys, trust, monkeypatch, step
) -> None:
    folder = signed(tmp_path / "b", keys[0])
    trust(keys[0].public)
    old = storage.read(folder).manifest
    new = replace(old, tuning={"cpu": {"max_batch": 2}})
    whole, calls = storage._replace, []

    def killed(path: Path, data: bytes) -> None:
        if len(calls) == step:
            raise Killed
        calls.append(path.name)
        whole(path, data)

    monkeypatch.setattr(storage, "_replace", killed)
    with pytest.raises(Killed):
        storage.publish(new, folder, signing.signer(keys[0].private))
    monkeypatch.undo()
    trust(keys[0].public)
    assert storage.read(folder).manifest == (new if step >= 3 else old)
    assert storage.read(folder).signers


def test_keys_that_can_not_be_used_are_one_line(tmp_path, keys) -> None:
    rsa = Key(tmp_path, "rsa", "rsa")
    locked = tmp_path / "locked.pem"
    openssl("pkey", "-in", keys[0].private, "-aes256", "-passout", "pass:x", "-out", locked)
    (tmp_path / "noise").write_bytes(bytes(range(256)))
    (tmp_path / "empty").write_text("")
    private = {
        rsa.private: "no Ed25519 private key",
        keys[0].public: "no Ed25519 private key",
        locked: "is encrypted",
        tmp_path / "noise": "no PEM file",
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
    for empty in ("", " "):  # a secret that did not arrive must not open the door
        with pytest.raises(OptionError, match="is set and empty"):
            signing.trusted({signing.TRUSTED: empty})
    # One that can't be read among those that can is no reason to go on with fewer.
    mixed = tmp_path / "mixed.pem"
    mixed.write_text(keys[0].public.read_text() + rsa.public.read_text())
    with pytest.raises(OptionError, match="nothing else"):
        signing.trusted({signing.TRUSTED: str(mixed)})
    torn = tmp_path / "torn.pem"
    torn.write_text(keys[0].public.read_text() + keys[1].public.read_text()[:-10])
    with pytest.raises(OptionError, match="a key in it is not whole"):
        signing.trusted({signing.TRUSTED: str(torn)})
