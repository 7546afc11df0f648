"""Ed25519 signatures (RFC 8032) of manifests: sign with a private key, check with trusted keys.

Keys are PEM files in the format of `openssl genpkey -algorithm ed25519`. A manifest contains the
sha256 of all files of the bundle, so a signature of the manifest covers the files too.

The file `manifest.sig` has one line per signature: `ed25519 PUBLIC-KEY SIGNATURE`, with key and
signature in base64.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from serving.errors import BundleError, OptionError
from serving.terminal import quote_path

if TYPE_CHECKING:
    from nacl.signing import SigningKey

TRUSTED: Final = "FLEDGE_TRUSTED_KEYS"
"""Environment variable with the path of a PEM file of trusted public keys.

If the variable is not set, signatures by any key and unsigned manifests are accepted."""

Sign = Callable[[bytes], str]
"""Function that signs bytes and returns a line for `manifest.sig`."""

_KIND: Final = "ed25519"
_MAKE: Final = "make one with `openssl genpkey -algorithm ed25519`"

# The DER bytes before the 32 bytes of a key, the same for every key (RFC 8410).
_PRIVATE: Final = bytes.fromhex("302e020100300506032b657004220420")
_PUBLIC: Final = bytes.fromhex("302a300506032b6570032100")
_PEM: Final = re.compile(r"-----BEGIN ([A-Z ]+)-----([^-]*)-----END \1-----")


def signer(path: Path) -> Sign:
    """Return a function that signs with the private key in a PEM file.

    Raises:
        OptionError: The file can't be read, or has no unencrypted Ed25519 private key.
    """
    from nacl.signing import SigningKey

    blocks = _blocks(path, "--sign")
    kinds = [kind for kind, _ in blocks]
    if "ENCRYPTED PRIVATE KEY" in kinds:
        raise OptionError(
            f"--sign {path} is encrypted; decrypt it with "
            f"`openssl pkey -in {quote_path(path)} -out KEY`"
        )
    keys = [_key(data, _PRIVATE) for kind, data in blocks if kind == "PRIVATE KEY"]
    if len(keys) != 1 or keys[0] is None:
        raise OptionError(f"--sign {path} holds no Ed25519 private key in PEM; {_MAKE}")
    key = SigningKey(keys[0])
    return lambda data: _line(key, data)


def trusted(environ: Mapping[str, str] | None = None) -> Mapping[bytes, str] | None:
    """Read the trusted public keys from the file that FLEDGE_TRUSTED_KEYS names.

    Args:
        environ: Environment variables. None: those of this process.

    Returns:
        A mapping from each key (32 bytes) to its display name; None if the variable is not set.

    Raises:
        OptionError: The variable is set but empty, or the file can't be read, or the file does not
            consist of Ed25519 public keys in PEM.
    """
    path = (os.environ if environ is None else environ).get(TRUSTED)
    if path is None:
        return None
    path = path.strip()
    if not path:
        raise OptionError(f"{TRUSTED} is set and empty: name a file of keys, or unset it")
    blocks = _blocks(Path(path), f"{TRUSTED} =")
    keys = [_key(data, _PUBLIC) for kind, data in blocks if kind == "PUBLIC KEY"]
    # Fail closed: a file without keys must not disable the check, and an unreadable key may be the
    # one that the operator needs.
    if not keys or None in keys or len(keys) != len(blocks):
        raise OptionError(
            f"{TRUSTED} = {path}: it must hold Ed25519 public keys in PEM and nothing else, as "
            "`openssl pkey -in KEY -pubout` writes them"
        )
    return {key: name(key) for key in keys if key is not None}


def check(data: bytes, signatures: str | None, keys: Mapping[bytes, str] | None) -> list[str]:
    """Check the signatures of a manifest and return the names of the keys that signed it.

    Args:
        data: The bytes of the manifest.
        signatures: The text of `manifest.sig`, or None if the file does not exist.
        keys: The trusted keys, from `trusted`; signatures by other keys are ignored. None:
            signatures by any key are accepted, and `signatures` may be None too.

    Raises:
        BundleError: `signatures` contains no valid signature of `data`. Or `keys` is given, and
            none of these keys signed the manifest.
    """
    if signatures is None:
        if keys is None:
            return []
        raise BundleError(f"it is not signed, and {TRUSTED} is set; export it with --sign")
    signers = [key for line in signatures.splitlines() if (key := _verified(line, data))]
    if not signers:
        raise BundleError("it has no valid signature of this manifest; was the manifest changed?")
    if keys is None:
        return [name(key) for key in signers]
    known = [keys[key] for key in signers if key in keys]
    if not known:
        raise BundleError(f"{name(signers[0])} signed it, which is not in {TRUSTED}")
    return known


def name(key: bytes) -> str:
    """Return the display name of a public key: `key` and the first 16 hex digits of its sha256."""
    return f"key {hashlib.sha256(key).hexdigest()[:16]}"


def _line(key: SigningKey, data: bytes) -> str:
    public, signature = bytes(key.verify_key), key.sign(data).signature
    return " ".join([_KIND, *(base64.b64encode(part).decode() for part in (public, signature))])


def _verified(line: str, data: bytes) -> bytes | None:
    """Return the public key in a line of `manifest.sig`, or None if the signature is not valid.

    Args:
        line: The line.
        data: The bytes of the manifest that were signed.
    """
    from nacl.exceptions import CryptoError
    from nacl.signing import VerifyKey

    words = line.split()
    if len(words) != 3 or words[0] != _KIND:
        return None
    try:
        public, signature = (base64.b64decode(word, validate=True) for word in words[1:])
        VerifyKey(public).verify(data, signature)
    except (CryptoError, ValueError, TypeError):
        return None
    return public


def _blocks(path: Path, option: str) -> list[tuple[str, bytes]]:
    """Read the blocks of a PEM file.

    Args:
        path: The file.
        option: The option or variable that names the file, for error messages.

    Returns:
        For each block, the kind, such as "PUBLIC KEY", and the decoded content.

    Raises:
        OptionError: The file can't be read, or a block is malformed.
    """
    try:
        text = path.read_text(encoding="ascii")
        found = [(kind, "".join(body.split())) for kind, body in _PEM.findall(text)]
        if len(found) != text.count("-----BEGIN"):
            raise OptionError(f"{option} {path}: a key in it is incomplete; copy it again")
        return [(kind, base64.b64decode(body, validate=True)) for kind, body in found]
    except OSError as error:
        raise OptionError(f"{option} {path}: {error.strerror}") from error
    except (UnicodeDecodeError, binascii.Error) as error:
        raise OptionError(f"{option} {path} is not a PEM file of keys; {_MAKE}") from error


def _key(data: bytes, prefix: bytes) -> bytes | None:
    """Return the raw 32 bytes of an Ed25519 key, or None if `data` is another kind of key.

    Args:
        data: The key in DER format.
        prefix: The DER header, which is the same for all Ed25519 keys.
    """
    key = data.removeprefix(prefix)
    return key if len(key) == 32 and data != key else None
