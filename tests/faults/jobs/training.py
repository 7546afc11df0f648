"""Jobs that train, resume a run, or write its report."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torchvision
from safetensors import safe_open

import fledge
from serving.utils.files import atomic_write
from tests.faults.file_operations import READING, Operation
from tests.faults.jobs.base import CommandJob
from tests.support.finished_run import finished
from tests.training.conftest import coloured
from training.activations import frozen_prefix
from training.engine import stages
from training.report import lr_plots, report
from training.run.folder import LAST_FOLDER, RUN_FILE

# What a child process would import.
for _name in (
    "serving.inference.predictor",
    "tensorboardX.proto.event_pb2",
    "tensorboardX.record_writer",
    "tomli_w",
    "training.cli.train",
    "training.distributed.torchrun",
    "training.engine.finetune",
):
    importlib.import_module(_name)

torch.set_num_threads(1)
report._template()  # takes long
_PNG = b"\x89PNG" + bytes(20_000)
_BLOCKS = [[1, 16, 1, 1], [6, 24, 1, 2], [6, 32, 1, 2]]
_RECIPE = f"""
name = "tiny"
arch = "mobilenet_v2"
batch_size = 4
precision = "fp32"
arch_args = {{ width_mult = 0.25, inverted_residual_setting = {_BLOCKS} }}
preprocess = {{ size = 32, crop = 1.0 }}
head = {{ hidden = 8 }}
[[stage]]
name = "head"
lr = 0.01
cycle_len = """


class Train(CommandJob):
    """One epoch, with caches, checkpoints, resume state, plot and report."""

    epochs = 1
    ignored = ("cache", "tmp")  # a cache that fails is not used
    optional = ("runs/latest",)

    def prepare(self) -> None:
        coloured(self.inputs / "photos", {"blue": 4, "red": 4})
        (self.inputs / "tiny.toml").write_text(f"{_RECIPE}{self.epochs}\n")
        torch.manual_seed(0)
        state = torchvision.models.mobilenet_v2(
            width_mult=0.25, inverted_residual_setting=_BLOCKS
        ).state_dict()
        torch.save(state, self.inputs / "weights.pth")
        (self.work / "runs").mkdir()
        (self.work / "tmp").mkdir()

    @property
    def folder(self) -> Path:
        return self.work / "runs" / "tiny"

    @property
    def swept(self) -> Path:
        return self.work / "runs"  # jobs of their own sweep the caches

    def command(self) -> list[str]:
        return [
            "train", str(self.inputs / "tiny.toml"), "--data", str(self.inputs / "photos"),
            "--out", str(self.folder), "--device", "cpu",
            "--weights", str(self.inputs / "weights.pth"),
        ]  # fmt: skip

    def run(self) -> int:
        return self.main(self.command())

    def main(self, command: list[str]) -> int:
        tempfile.tempdir = str(self.work / "tmp")
        os.environ["FLEDGE_CACHE"] = str(self.work / "cache")

        def draw(_rows: Any, path: Path, _title: str) -> None:
            with atomic_write(path) as partial:
                partial.write_bytes(_PNG)

        with (
            mock.patch.object(frozen_prefix, "fused", lambda prefix: prefix),
            mock.patch.object(lr_plots, "schedule", draw),  # takes long
            mock.patch.object(time, "perf_counter", return_value=0.0),
            mock.patch.object(time, "time", return_value=1.6e9),
        ):
            return fledge.main(command)

    def again(self) -> int:
        if not (self.folder / RUN_FILE).exists():
            return self.run()
        finished = not (self.folder / LAST_FOLDER).exists()
        status = self.main(["train", "--resume", str(self.folder)])
        if finished and not status:  # its report may lack what could not be read
            status = self.main(["report", str(self.folder), "--device", "cpu"])
        return status

    def tolerates(self, operation: Operation) -> bool:
        return operation.kind in READING  # a report is made without what can't be read

    def result(self) -> dict[str, Any]:
        run = self.folder
        for path in run.rglob("[!.]*.safetensors"):
            with safe_open(path, framework="pt") as file:
                assert file.keys()
        if not (run / RUN_FILE).exists() or (run / LAST_FOLDER).exists():
            return {}
        return {
            path.relative_to(run).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(run.rglob("[!.]*"))
            if path.is_file()
            and path.parent.name[0] != "."
            and path.suffix in (".safetensors", ".json", ".csv", ".html", ".toml", ".png")
        }


class Report(Train):
    """The report of a finished run, which replaces an older one."""

    ignored = ()

    def prepare(self) -> None:
        coloured(self.inputs / "photos", {"blue": 3, "red": 3})
        (self.work / "tmp").mkdir()
        finished(self.folder, self.inputs / "photos")
        (self.folder / "report.html").write_text("older")

    @property
    def swept(self) -> Path:
        return self.work / "runs"  # jobs of their own sweep the caches

    def command(self) -> list[str]:
        return ["report", str(self.folder), "--device", "cpu"]

    def again(self) -> int:
        return self.run()

    def result(self) -> dict[str, Any]:
        return self.read("runs/tiny/report.html")


class Resume(Train):
    """The second epoch of a run that was killed after its first."""

    epochs = 2

    def prepare(self) -> None:
        super().prepare()
        run_epoch = stages._run_epoch

        class Killed(BaseException):
            pass

        def first_epoch(run: Any, *arguments: Any) -> Any:
            if run.position.epoch:
                raise Killed
            return run_epoch(run, *arguments)

        with mock.patch.object(stages, "_run_epoch", first_epoch), contextlib.suppress(Killed):
            super().run()
        assert (self.folder / LAST_FOLDER / "state.safetensors").exists()

    def run(self) -> int:
        return self.main(["train", "--resume", str(self.folder)])
