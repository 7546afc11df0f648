"""Jobs that export a run."""

from __future__ import annotations

import base64
import importlib
import os
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from nacl.signing import SigningKey

import fledge
from export import benchmark, pipeline
from export.writers import formats, onnx
from serving.bundle import signing, storage
from serving.inference.runtime import OnnxRuntime
from tests.export.conftest import Run
from tests.faults.jobs.base import CommandJob
from tests.support.tiny_bundle import tiny_bundle

for _name in ("export.cli", "training.cli.train", "export.precision.select"):
    importlib.import_module(_name)

torch.set_num_threads(1)

_SETTING = benchmark.ThreadSetting(1, 1, 1)


class ExportFirst(CommandJob):
    """An export into a new folder. The graphs were written before: writing them takes long."""

    def prepare(self) -> None:
        run = Run(self.inputs, per_class=2)
        write = onnx.write
        graph = self.inputs / "graph.onnx"

        def keep(*arguments: Any, **facts: Any) -> None:
            write(arguments[0], graph, **facts)
            raise _Written

        with mock.patch.object(onnx, "write", keep):
            try:
                pipeline.export(run.folder, self.inputs / "none", log=lambda line: None)
            except _Written:
                return
        raise AssertionError("onnx.write was not called")

    def command(self) -> list[str]:
        run = self.inputs / "runs" / "tiny"
        return ["export", str(run), "--out", str(self.out), "--precision", "fp32"]

    @property
    def out(self) -> Path:
        return self.work / "bundle"

    def run(self) -> int:
        data = (self.inputs / "graph.onnx").read_bytes()

        def write(_graph: Any, path: Path, **_facts: Any) -> None:
            path.write_bytes(data)

        def runtime(path: Path) -> OnnxRuntime:
            return OnnxRuntime(path.with_name(pipeline.ONNX), device="cpu")

        rates = {"fp32": {_SETTING: 100.0}}
        others = [one._replace(write=write, open=runtime) for one in formats.FORMATS]
        export = partial(pipeline.export, formats=others)
        with (
            mock.patch.object(onnx, "write", write),
            mock.patch.object(pipeline, "export", export),
            mock.patch.object(benchmark, "measure", return_value=rates),
        ):
            return fledge.main(self.command())

    def result(self) -> dict[str, Any]:
        if not (self.out / storage.MANIFEST).exists():
            return {"manifest": None}
        return {"manifest": storage.read(self.out).manifest.to_json()}


class _Written(BaseException):
    """Ends an export after its first file."""


class Export(ExportFirst):
    """A signed export that replaces a signed bundle."""

    def prepare(self) -> None:
        super().prepare()
        self.make_keys()
        tiny_bundle(self.out)
        manifest = storage.read(self.out).manifest
        storage.publish(manifest, self.out, signing.signer(self.inputs / "key.pem"))

    def make_keys(self) -> None:
        """Write a private key, and the public key that readers trust."""
        seed = bytes(32)
        keys = {
            "key.pem": ("PRIVATE KEY", signing._PRIVATE + seed),
            "key.pub": ("PUBLIC KEY", signing._PUBLIC + bytes(SigningKey(seed).verify_key)),
        }
        for name, (kind, der) in keys.items():
            body = base64.b64encode(der).decode()
            text = f"-----BEGIN {kind}-----\n{body}\n-----END {kind}-----\n"
            (self.inputs / name).write_text(text)

    def command(self) -> list[str]:
        return [*super().command(), "--sign", str(self.inputs / "key.pem")]

    def result(self) -> dict[str, Any]:
        os.environ[signing.TRUSTED] = str(self.inputs / "key.pub")
        try:
            return super().result()
        finally:
            del os.environ[signing.TRUSTED]
