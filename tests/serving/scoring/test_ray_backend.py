"""Scoring on Ray: the same table as on one machine, also when machines are lost."""

import contextlib
import csv
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import fledge
from serving.errors import OptionError, WorkError
from serving.evaluation import table_reader
from serving.inference import runtime
from serving.scoring import ray_backend, ray_cluster, score
from serving.scoring.options import ScoringOptions
from tests.support import ray_interrupt
from tests.support.ray_patience import ATTEMPTS, COVERAGE, LATE, PORTS, free_ports
from tests.support.tiny_bundle import photo, tiny_bundle

ROOT = Path(__file__).parents[3]
PHOTOS = 40
"""Photos, two of them broken, that a list names repeatedly."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "b", classes=7)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for seed in range(PHOTOS):
        (folder / f"{seed}.jpg").write_bytes(photo(seed, (640, 480)))
    (folder / "7.jpg").write_bytes(photo(7)[:900])
    (folder / "8.jpg").write_bytes(b"hello")
    return folder


def listed(path: Path, photos: Path, images: int) -> Path:
    names = (f"{photos / str(number % PHOTOS)}.jpg\n" for number in range(images))
    path.write_text("".join(names))
    return path


def table_of(inputs: Path | str, bundle: Path, out: Path, **options: Any) -> bytes:
    """The table, by the local engine unless `options` name another."""
    scoring = ScoringOptions(device="cpu", **options)
    score.score([str(inputs)], bundle, out, scoring, log=lambda line: None)
    return out.read_bytes() if out.is_file() else b""


@pytest.fixture
def environment() -> dict[str, str]:
    environment = {name: text for name, text in os.environ.items() if name != "RAY_ADDRESS"}
    # On a busy machine Ray's agents take longer than its timeout of 30 s.
    return environment | {"PYTHONPATH": str(ROOT), "RAY_agent_register_timeout_ms": "300000"}


def without_progress(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if not line.endswith(" s left")]


def command(*words: object) -> list[str]:
    return [sys.executable, str(ROOT / "fledge.py"), "score", *map(str, words), "--engine", "ray"]


def test_a_missing_ray_package_is_one_line_and_exit_2(
    photos: Path,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "ray" else find(name, *rest),
    )
    words = ["score", str(photos), "--bundle", str(bundle), "--out", str(tmp_path / "out.csv")]
    assert fledge.main([*words, "--engine", "ray"]) == 2
    stderr = capsys.readouterr().err
    assert stderr == "fledge: --engine ray needs ray: pip install 'ray[data]'\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "http://127.0.0.1:8265"])
def test_an_unsupported_address_is_refused(
    photos: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(OptionError, match=f"RAY_ADDRESS={address}: use HOST:PORT"):
        table_of(photos, bundle, tmp_path / "out.csv", engine="ray")
    assert list(tmp_path.iterdir()) == []


def test_an_unreachable_cluster_fails_at_once(
    photos: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as bound:  # bound, and not listening
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        started = time.monotonic()
        with pytest.raises(WorkError, match=f"can't reach the cluster {address}: .*refused"):
            table_of(photos, bundle, tmp_path / "out.csv", engine="ray")
    assert time.monotonic() - started < 10
    assert "ray" not in sys.modules
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"engine": "spark"}, "--engine spark: use local or ray"),
        ({"out": "out.xls"}, r"out\.xls: use a name that ends in"),
        ({"out": "none/scores"}, "no folder .*none; make it"),
        ({"out": ""}, "exists and is not a table"),
        ({"workers": 0}, "--workers 0"),
        ({"top_k": 0}, "--top-k 0"),
        ({"embeddings": True}, "Parquet"),
    ],
)
def test_a_wrong_option_is_refused_before_ray_is_imported(
    photos: Path, bundle: Path, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    (tmp_path / "mine").touch()
    out = tmp_path / options.pop("out", "out.csv")
    with pytest.raises(OptionError, match=words):
        table_of(photos, bundle, out, **{"engine": "ray"} | options)
    assert "ray" not in sys.modules
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_folder_is_an_output_only_of_ray(photos: Path, bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="use a name that ends in"):
        table_of(photos, bundle, tmp_path / "scores")


class Shards:
    """The part of `ScoringJournal` that tasks are made from."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0

    def todo(self) -> Iterator[tuple[int, list[str]]]:
        for shard, start in enumerate(range(0, self.total, 1000)):
            yield shard, [str(number) for number in range(start, min(start + 1000, self.total))]


@pytest.mark.parametrize(
    ("total", "batch", "workers", "sizes"),
    [
        (10, 1, 4, {10}),
        (1000, 1, 2, {32, 1000 % 32}),
        (1000, 24, 2, {24, 1000 % 24}),
        (20_000, 1, 4, {312, 1000 % 312}),
        (900_000, 16, 8, {992, 8}),
        (3000, 2048, 8, {1000}),
    ],
)
def test_tasks_are_whole_batches_of_a_shard(
    total: int, batch: int, workers: int, sizes: set[int]
) -> None:
    tasks = list(ray_backend._tasks(Shards(total), batch, workers))  # type: ignore[arg-type]
    assert [name for task in tasks for name in json.loads(task["names"])] == [
        str(number) for number in range(total)
    ]
    assert {task["images"] for task in tasks} == sizes
    assert all(task["part"] % batch == 0 for task in tasks)


def test_gpus_and_cores_are_shared_evenly() -> None:
    def node(**resources: float) -> dict[str, Any]:
        return {"Alive": True, "Resources": resources}

    nodes = [node(CPU=64), node(CPU=16, GPU=4), node(CPU=12, GPU=2)]
    assert ray_cluster._threads(nodes, 1) == 4
    assert ray_cluster._threads(nodes, 2) == 2
    assert ray_cluster._threads([node(CPU=1, GPU=4)], 1) == 1


def test_a_machine_without_the_images_is_an_error(tmp_path: Path) -> None:
    missing, folder = str(tmp_path / "missing.jpg"), str(tmp_path / "none")
    config = ray_backend.RayWorkerConfig(
        "bundle", None, "cpu", "auto", 1, folder, missing, ScoringOptions(), 1
    )
    task = {"shard": 0, "part": 0, "images": 1, "names": f'["{missing}"]'}
    result = ray_backend.RayWorker(config)(task)
    assert result["error"].startswith(f"OptionError:{missing} is not there: every machine")
    assert socket.gethostname() in result["error"]
    assert result["rows"] == ""


class InProcessPool(ray_cluster.ActorPool):
    """An actor pool in this process, without ray."""

    def map(self, worker: type, config: Any, tasks: list[dict[str, Any]], log: Any) -> Any:
        yield from map(worker(config), tasks)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(ray_cluster, "connect", lambda *_: InProcessPool("cpu", 1, 1, {}))
    monkeypatch.setattr(ray_cluster, "put", lambda value: value)
    monkeypatch.setattr(ray_cluster, "get", lambda value: value)
    return monkeypatch


@pytest.mark.parametrize(("error", "kept"), [(WorkError, True), (OptionError, False)])
def test_the_list_of_inputs_is_kept_unless_the_options_must_change(
    photos: Path,
    bundle: Path,
    tmp_path: Path,
    in_process: pytest.MonkeyPatch,
    error: type[Exception],
    kept: bool,
) -> None:
    def failing(*_: object) -> None:
        raise error("the message")

    in_process.setattr(InProcessPool, "map", lambda *_: (failing() for _ in range(1)))
    with pytest.raises(error, match="the message"):
        table_of(photos, bundle, tmp_path / "out.csv", engine="ray")
    assert (tmp_path / ".out.csv.parts" / "inputs.jsonl").exists() == kept


def test_only_tasks_with_addresses_get_more_threads(
    photos: Path, bundle: Path, tmp_path: Path, in_process: pytest.MonkeyPatch
) -> None:
    names = listed(tmp_path / "list.txt", photos, 96)
    table = table_of(names, bundle, tmp_path / "out.csv")
    lines = names.read_text().splitlines()
    lines[70] = f"file://{lines[70]}"
    names.write_text("\n".join(lines))
    used: list[int] = []
    score_chunks = ray_backend.score_chunks

    def counted(work: Any, chunks: Any, threads: int) -> Any:
        used.append(threads)
        return score_chunks(work, chunks, threads)

    in_process.setattr(ray_backend, "score_chunks", counted)
    there = table_of(names, bundle, tmp_path / "out.csv", engine="ray")
    assert there.replace(b"file://", b"") == table
    assert used == [8]


@pytest.mark.slow
def test_a_lost_machine_does_not_change_the_table(
    photos: Path, bundle: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    names = listed(tmp_path / "list.txt", photos, 3000)
    table_of(listed(tmp_path / "once.txt", photos, PHOTOS), bundle, tmp_path / "here.csv")
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.ray_loss", bundle, names, tmp_path / "there.csv"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    if runtime.expected("auto") == runtime.PROVIDERS["cpu"]:  # the cluster's GPU does not exist
        assert result["logged"].pop(0).startswith("OptionError device = cuda: ")
    assert result["actors"] == 1
    assert 750 < result["at"] < 2900
    assert any(line.startswith("lost ") for line in result["logged"])
    tables = []
    for name in ("here.csv", "there.csv"):
        with (tmp_path / name).open(newline="") as file:
            tables.append(list(csv.DictReader(file)))
    expected = {row["path"]: row for row in tables[0]}
    assert len(expected) == PHOTOS
    assert [row["path"] for row in tables[1]] == names.read_text().splitlines()
    for other in tables[1]:
        one = expected[other["path"]]
        for column in ("status", "label", "error", "applied", "views"):
            assert one[column] == other[column]
        if one["status"] == "ok":
            assert float(one["probability"]) == pytest.approx(float(other["probability"]), abs=1e-5)


@pytest.mark.slow
def test_on_one_machine_ray_prints_nothing_and_ctrl_c_ends_all_processes(
    photos: Path, bundle: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    images = 20 * ray_interrupt.IMAGES  # enough that most are left after the first shard
    names = listed(tmp_path / "list.txt", photos, images)
    once, here = listed(tmp_path / "once.txt", photos, PHOTOS), tmp_path / "here.parquet"
    table_of(once, bundle, here, embeddings=True, tta=2)
    paths = names.read_text().splitlines()
    names.write_text(names.read_text().replace("/", "file:///", 1))
    rest = ("--bundle", bundle, "--out", tmp_path / "scores", "--embeddings", "--tta", 2)
    words = command(names, *rest, "--workers", 2)
    words[1:2] = ["-m", "tests.support.ray_interrupt"]
    with subprocess.Popen(
        words,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as running:
        parts = tmp_path / ".scores.parts"
        while not list(parts.glob("*.jsonl"))[1:]:  # inputs.jsonl, and the first shard
            assert running.poll() is None, running.communicate()
            time.sleep(0.05)
        children = psutil.Process(running.pid).children(recursive=True)
        os.killpg(running.pid, signal.SIGINT)  # as a terminal does
        _, stderr = running.communicate(timeout=300)
    assert running.returncode == 130
    assert without_progress(stderr) == ["fledge: interrupted"]
    assert len(children) > 5
    assert psutil.wait_procs(children, timeout=120)[1] == []

    done = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert without_progress(done.stderr) == []
    lines = done.stdout.splitlines()
    assert lines[0].startswith("going on: ")
    assert lines[-1] == f"wrote {tmp_path / 'scores'}"
    assert len(lines) == 5
    expected = {one.path: one for one in table_reader.read(here)}
    found = list(table_reader.read(tmp_path / "scores"))
    assert [one.path.removeprefix("file://") for one in found] == paths
    for path, other in zip(paths, found, strict=True):
        one = expected[path]
        assert (one.label, one.code) == (other.label, other.code)
        assert one.probability == pytest.approx(other.probability, abs=1e-5)


@contextlib.contextmanager
def head_node(environment: dict[str, str], log: Path) -> Iterator[str]:
    """The address of a cluster of one node. On a busy machine it is started more than once."""
    start = "import sys; from ray.scripts.scripts import main; main()"
    options = ["--num-cpus=1", "--disable-usage-stats", "--include-dashboard=false"]
    environment = {name: text for name, text in environment.items() if name != COVERAGE}
    for attempt in range(ATTEMPTS):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = ["start", "--head", "--block", f"--port={port}", *options]
        words += [
            f"{name}={number}" for name, number in zip(PORTS.values(), free_ports(), strict=True)
        ]
        with (
            log.open("w") as output,
            subprocess.Popen(
                [sys.executable, "-c", start, *words], env=environment, stdout=output, stderr=output
            ) as head,
        ):
            try:
                while head.poll() is None and "Ray runtime started" not in log.read_text():
                    time.sleep(0.2)
                if head.poll() is None:
                    yield f"127.0.0.1:{port}"
                    return
                assert LATE in log.read_text(), log.read_text()
                assert attempt < ATTEMPTS - 1
            finally:
                children = psutil.Process(head.pid).children(True) if head.poll() is None else []
                head.terminate()
                head.wait(60)
                for process in children:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()


@pytest.mark.slow
def test_a_cluster_with_a_token_requires_the_token(
    photos: Path, bundle: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    names = listed(tmp_path / "list.txt", photos, PHOTOS)
    table_of(names, bundle, tmp_path / "here.csv")
    environment |= {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}
    rest = ("--bundle", bundle, "--out", tmp_path / "there.csv", "--device", "cpu")
    with head_node(environment, tmp_path / "log") as address:
        environment["RAY_ADDRESS"] = address
        for change, code, message in (
            ({"RAY_AUTH_MODE": "disabled"}, 1, "needs RAY_AUTH_MODE=token"),
            ({"RAY_AUTH_TOKEN": "b" * 64}, 1, "compare the token with that of the head"),
            ({}, 0, ""),
        ):
            done = subprocess.run(
                command(names, *rest),
                env=environment | change,
                capture_output=True,
                text=True,
                check=False,
                timeout=600,
            )
            assert done.returncode == code, done.stderr
            assert message in done.stderr
    assert (tmp_path / "there.csv").read_bytes() == (tmp_path / "here.csv").read_bytes()
