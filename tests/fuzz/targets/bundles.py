"""Bundles: the manifest, and the files of checksums, signatures and trusted keys."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from serving.bundle import inspect, signing, storage
from serving.bundle.manifest import Manifest, content_version
from serving.errors import BundleError
from tests.fuzz import mutators
from tests.fuzz.target import Target, put

_BUNDLE = Path("bundle")
_PAYLOAD = Path("payload")
_PAYLOAD_FILES = {
    "model.onnx": b"graph",
    "model.int8.onnx": b"small graph",
    "golden/0.jpg": b"photo",
    "README.md": b"# a\n",
}


def _manifest() -> Manifest:
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in _PAYLOAD_FILES.items()}
    graph = {"file": "model.onnx", "accuracy": 0.9, "tolerance": 1e-4}
    values = {
        "schema": 1,
        "name": "tiny",
        "version": "",
        "arch": "resnet18",
        "labels": ["daisy", "rose"],
        "preprocess": {
            "size": 32,
            "crop": 0.875,
            "interpolation": "bilinear",
            "mean": [0.5, 0.5, 0.5],
            "std": [0.2, 0.2, 0.2],
            "background": [255, 255, 255],
        },
        "precisions": {"fp32": graph, "int8": {**graph, "file": "model.int8.onnx"}},
        "files": {
            name: {"sha256": digest, "bytes": len(_PAYLOAD_FILES[name])}
            for name, digest in digests.items()
        },
        "views": [
            {"name": "plain", "zoom": 1.0, "x": 0.5, "y": 0.5, "flip": False},
            {"name": "mirror", "zoom": 1.1, "x": 0.0, "y": 1.0, "flip": True},
        ],
        "thresholds": {"confident": 0.7, "energy": -3.5},
        "calibration": {"before": {"ece": 0.1, "loss": 0.5}, "after": {"ece": 0.05, "loss": 0.4}},
        "tried": {"fp16": {"kept": False, "why_not": "slower"}},
        "graph": {
            "input": {"name": "pixels", "dtype": "uint8", "shape": ["batch", 32, 32, 3]},
            "outputs": {
                "logits": {"dtype": "float32", "shape": ["batch", 2]},
                "features": {"dtype": "float32", "shape": ["batch", 8]},
            },
        },
        "golden": [{"file": "golden/0.jpg", "probabilities": {"fp32": [0.25, 0.75]}}],
        "tta": {
            "advised": 2,
            "photos": 100,
            "views": [{"views": 2, "fixed": 3, "broken": 1, "p": 0.3}],
        },
        "parity": {"photos": 10, "graphs": {"onnx": {"largest_difference": 1e-6}}},
        "batchnorm": {"found": 20, "folded": 20, "left": []},
        "tuning": {
            "cpu": {
                "cores": 2,
                "throughput": {
                    "fp32": {"workers": 2, "threads": 1, "batch": 1, "images_per_second": 9.5}
                },
                "latency": {"fp32": {"threads": 2, "ms": 3.5}},
            }
        },
        "provenance": {"run": "r", "data": {"source": "d", "train": 80, "valid": 20}},
    }
    return Manifest.from_json(json.dumps(values))


def _versioned(manifest: Manifest) -> Manifest:
    digests = {name: manifest.files[name]["sha256"] for name in manifest.graphs}
    return manifest.model_copy(update={"version": content_version(manifest, digests)})


def prepare() -> None:
    for name, data in _PAYLOAD_FILES.items():
        (_PAYLOAD / name).parent.mkdir(parents=True, exist_ok=True)
        (_PAYLOAD / name).write_bytes(data)
    _BUNDLE.mkdir()
    os.environ.pop(signing.TRUSTED, None)


def manifest_seeds() -> Iterator[bytes]:
    whole = _versioned(_manifest())
    yield whole.to_json().encode()
    yield json.dumps(json.loads(whole.to_json())).encode()
    values = json.loads(whole.to_json())
    for name in ("tta", "calibration", "tuning", "views", "golden", "graph", "parity", "tried"):
        less = {key: value for key, value in values.items() if key != name}
        yield repair_manifest(json.dumps(less).encode())


def check_manifest(data: bytes) -> None:
    """Read a bundle whose manifest is the input, with the right checksum, and describe it."""
    put(_BUNDLE / storage.MANIFEST, data)
    digest = hashlib.sha256(data).hexdigest()
    put(_BUNDLE / storage.CHECKSUM, f"{digest}  {storage.MANIFEST}\n".encode())
    payload = _link_payload(data)
    try:
        for line in inspect.describe(_BUNDLE):
            line.encode("utf-8", "backslashreplace")
        manifest = storage.read(_BUNDLE).manifest
        if Manifest.from_json(manifest.to_json()) != manifest:
            raise AssertionError("the manifest changes when it is written and read again")
    finally:
        if payload:
            payload.unlink()


def _link_payload(data: bytes) -> Path | None:
    """Make the payload folder of the manifest's version, if that is a plain name."""
    try:
        version = json.loads(data)["version"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    if not isinstance(version, str) or not version.isalnum() or len(version) > 40:
        return None
    link = _BUNDLE / version
    try:
        link.symlink_to(_PAYLOAD.absolute())
    except (OSError, ValueError):
        return None
    return link


def repair_manifest(data: bytes) -> bytes:
    """State the version that belongs to the content, if the rest is valid."""
    try:
        values = json.loads(data)
        values["version"] = _versioned(Manifest.from_json(data.decode())).version
        return json.dumps(values).encode()
    except (BundleError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return data


# Checksums, signatures and keys


def prepare_signature() -> None:
    prepare()
    manifest = _versioned(_manifest())
    shutil.copytree(_PAYLOAD, _BUNDLE / manifest.version)
    (_BUNDLE / storage.MANIFEST).write_bytes(manifest.to_json().encode())
    os.environ[signing.TRUSTED] = str(Path("keys.pem").absolute())


def signature_seeds() -> Iterator[bytes]:
    import base64

    from nacl.signing import SigningKey

    text = _versioned(_manifest()).to_json().encode()
    key = SigningKey(bytes(range(32)))
    public = base64.b64encode(signing._PUBLIC + bytes(key.verify_key)).decode()
    pem = f"-----BEGIN PUBLIC KEY-----\n{public}\n-----END PUBLIC KEY-----\n".encode()
    digest = hashlib.sha256(text).hexdigest()
    line = signing._line(key, text).encode()
    files = {"manifest.sha256": f"{digest}  manifest.json".encode(), "manifest.sig": line}
    yield mutators.join_files({**files, "keys.pem": pem})
    yield mutators.join_files({**files, "keys.pem": pem + b"\n" + pem})
    yield mutators.join_files({**files, "manifest.sig": line + b"\n" + line, "keys.pem": pem})
    yield mutators.join_files({"manifest.sha256": files["manifest.sha256"], "keys.pem": pem})
    yield mutators.join_files(files)


def check_signature(data: bytes) -> None:
    files = mutators.split_files(data)
    for name in ("manifest.sha256", "manifest.sig", "keys.pem"):
        path = Path("keys.pem") if name == "keys.pem" else _BUNDLE / name
        put(path, files.get(name))
    storage.read(_BUNDLE, require_trusted=False)
    bundle = storage.read(_BUNDLE)
    if not bundle.signers:
        raise AssertionError("accepted without a trusted signature")


def _words(rng: random.Random, data: bytes) -> bytes:
    words = data.split(b" ")
    at = rng.randrange(len(words))
    words[at] = rng.choice((b"", words[0], words[-1], words[at][:-1], words[at] * 2, b"\xff", b"="))
    return b" ".join(words)


_NAMES = tuple(json.loads(_manifest().to_json()))
_KEYS = (b"-----BEGIN PUBLIC KEY-----", b"-----END PUBLIC KEY-----", b"-----BEGIN PRIVATE KEY-----")

TARGETS = (
    Target(
        "manifest",
        check_manifest,
        manifest_seeds,
        mutators.json_change(_NAMES),
        repair_manifest,
        prepare,
        words=tuple(f'"{name}"'.encode() for name in _NAMES),
    ),
    Target(
        "signature",
        check_signature,
        signature_seeds,
        mutators.files_change({"": mutators.one_of(mutators.lines_change(_words), _words)}),
        prepare=prepare_signature,
        words=(*_KEYS, b"%% manifest.sha256\n", b"%% manifest.sig\n", b"%% keys.pem\n"),
    ),
)
