"""Signatures of manifests: who made a bundle, and that nobody changed it since.

Ed25519 (RFC 8032), by keys in the PEM files that `openssl genpkey -algorithm ed25519` writes. A
manifest names the sha256 of every file, so its signature speaks for all of them.

`manifest.sig` has a line a signature: `ed25519 PUBLIC-KEY SIGNATURE`, both in base64.
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

if TYPE_CHECKING:
    from nacl.signing import SigningKey

TRUSTED: Final = "FLEDGE_TRUSTED_KEYS"
"""The environment variable that names a PEM file of public keys; unset, anybody is trusted."""

Sign = Callable[[bytes], str]
"""Bytes to sign -> a line for `manifest.sig`."""

_KIND: Final = "ed25519"
_MAKE: Final = "make one with `openssl genpkey -algorithm ed25519`"

# What stands before the 32 bytes of a key: the same bytes for every key (RFC 8410).
_PRIVATE: Final = bytes.fromhex("302e020100300506032b657004220420")
_PUBLIC: Final = bytes.fromhex("302a300506032b6570032100")
_PEM: Final = re.compile(r"-----BEGIN ([A-Z ]+)-----([^-]*)-----END \1-----")


def signer(path: Path) -> Sign:
    """What signs with the private key in a PEM file.

    Raises:
        OptionError: No such file, or no Ed25519 key in it that can be used as it is.
    """
    from nacl.signing import SigningKey

    blocks = _blocks(path, "--sign")
    kinds = [kind for kind, _ in blocks]
    if "ENCRYPTED PRIVATE KEY" in kinds:
        raise OptionError(f"--sign {path} is encrypted; `openssl pkey -in` writes it in clear")
    keys = [_key(data, _PRIVATE) for kind, data in blocks if kind == "PRIVATE KEY"]
    if len(keys) != 1 or keys[0] is None:
        raise OptionError(f"--sign {path} holds no Ed25519 private key in PEM; {_MAKE}")
    key = SigningKey(keys[0])
    return lambda data: _line(key, data)


def trusted(environ: Mapping[str, str] | None = None) -> Mapping[bytes, str] | None:
    """The public keys that may sign, 32 bytes each, and their names; None if nobody was named.

    Raises:
        OptionError: FLEDGE_TRUSTED_KEYS names no file of Ed25519 public keys.
    """
    stated = (os.environ if environ is None else environ).get(TRUSTED)
    if stated is None:
        return None
    stated = stated.strip()
    if not stated:
        raise OptionError(f"{TRUSTED} is set and empty: name a file of keys, or unset it")
    blocks = _blocks(Path(stated), f"{TRUSTED} =")
    keys = [_key(data, _PUBLIC) for kind, data in blocks if kind == "PUBLIC KEY"]
    # An empty list must not open the door that the operator meant to close; and a key that can't
    # be read may be the one that he relies on.
    if not keys or None in keys or len(keys) != len(blocks):
        raise OptionError(
            f"{TRUSTED} = {stated}: it must hold Ed25519 public keys in PEM and nothing else, as "
            "`openssl pkey -in KEY -pubout` writes them"
        )
    return {key: name(key) for key in keys if key is not None}


def check(data: bytes, signatures: str | None, keys: Mapping[bytes, str] | None) -> list[str]:
    """Who signed `data`: names of keys, those that are trusted alone where trust is asked for.

    Args:
        data: The manifest.
        signatures: The text of `manifest.sig`, or None where there is none.
        keys: As `trusted`.

    Raises:
        BundleError: A signature is not of `data`, or no key that is trusted made one.
    """
    if signatures is None:
        if keys is None:
            return []
        raise BundleError(f"nobody signed it, and {TRUSTED} is set; export it with --sign")
    signers = [key for line in signatures.splitlines() if (key := _verified(line, data))]
    if not signers:
        raise BundleError("no signature in it is of this manifest; was it changed since?")
    if keys is None:
        return [name(key) for key in signers]
    known = [keys[key] for key in signers if key in keys]
    if not known:
        raise BundleError(f"{name(signers[0])} signed it, which is none of {TRUSTED}")
    return known


def name(key: bytes) -> str:
    """How a public key is called: `key` and the first 16 hex digits of its sha256."""
    return f"key {hashlib.sha256(key).hexdigest()[:16]}"


def _line(key: SigningKey, data: bytes) -> str:
    public, signature = bytes(key.verify_key), key.sign(data).signature
    return " ".join([_KIND, *(base64.b64encode(part).decode() for part in (public, signature))])


def _verified(line: str, data: bytes) -> bytes | None:
    """The public key whose signature of `data` a line holds."""
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
    """Kind and content of every block of a PEM file."""
    try:
        text = path.read_text(encoding="ascii")
        found = [(kind, "".join(body.split())) for kind, body in _PEM.findall(text)]
        if len(found) != text.count("-----BEGIN"):
            raise OptionError(f"{option} {path}: a key in it is not whole; copy it again")
        return [(kind, base64.b64decode(body, validate=True)) for kind, body in found]
    except OSError as error:
        raise OptionError(f"{option} {path}: {error.strerror}") from error
    except (UnicodeDecodeError, binascii.Error) as error:
        raise OptionError(f"{option} {path} is no PEM file of keys; {_MAKE}") from error


def _key(data: bytes, prefix: bytes) -> bytes | None:
    """The 32 bytes behind a prefix; None for a key of another kind."""
    key = data.removeprefix(prefix)
    return key if len(key) == 32 and data != key else None
