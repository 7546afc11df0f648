"""Laws of scoring on Ray: the table of one machine, whatever happens to the others."""

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
from serving.evaluation import score_table
from serving.inference import runtime
from serving.scoring import ray_backend, ray_cluster, score
from serving.scoring.score import ScoringOptions
from tests.support.tiny_bundle import photo, tiny_bundle

ROOT = Path(__file__).parents[3]
KINDS = 40
"""Photos, two of them broken, that a list names again and again."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "b", classes=7)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for seed in range(KINDS):
        (folder / f"{seed}.jpg").write_bytes(photo(seed, (640, 480)))
    (folder / "7.jpg").write_bytes(photo(7)[:900])
    (folder / "8.jpg").write_bytes(b"hello")
    return folder


def listed(path: Path, photos: Path, images: int) -> Path:
    names = (f"{photos / str(number % KINDS)}.jpg\n" for number in range(images))
    path.write_text("".join(names))
    return path


def here(inputs: Path | str, bundle: Path, out: Path, **options: Any) -> bytes:
    """The table of the local engine."""
    wanted = ScoringOptions(device="cpu", **options)
    score.score([str(inputs)], bundle, out, wanted, say=lambda line: None)
    return out.read_bytes() if out.is_file() else b""


@pytest.fixture
def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    # On a machine with much else to do, Ray's agents take longer than the 30 s that it gives them.
    return kept | {"PYTHONPATH": str(ROOT), "RAY_agent_register_timeout_ms": "100000"}


def ours(stderr: str) -> list[str]:
    """Lines that are no progress."""
    return [line for line in stderr.splitlines() if not line.endswith(" s left")]


def command(*words: object) -> list[str]:
    return [sys.executable, str(ROOT / "fledge.py"), "score", *map(str, words), "--engine", "ray"]


def test_without_ray_it_is_one_line_and_exit_2(
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
    said = capsys.readouterr().err
    assert said == "fledge: --engine ray needs ray: pip install 'fledge[ray]'\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "http://127.0.0.1:8265"])
def test_an_address_of_another_kind_is_refused(
    photos: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(OptionError, match=f"RAY_ADDRESS={address}: use HOST:PORT"):
        here(photos, bundle, tmp_path / "out.csv", engine="ray")
    assert list(tmp_path.iterdir()) == []


def test_a_cluster_that_is_not_there_is_told_at_once(
    photos: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        started = time.monotonic()
        with pytest.raises(WorkError, match=f"can't reach the cluster {address}: .*refused"):
            here(photos, bundle, tmp_path / "out.csv", engine="ray")
    assert time.monotonic() - started < 10
    assert "ray" not in sys.modules
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"engine": "spark"}, "--engine spark: use local or ray"),
        ({"out": "out.xls"}, r"out\.xls: use a name that ends in"),
        ({"out": "none/scores"}, "no folder .*none; make it"),
        ({"out": ""}, "there, and no table"),
        ({"workers": 0}, "--workers 0"),
        ({"top_k": 0}, "--top-k 0"),
        ({"embeddings": True}, "Parquet"),
    ],
)
def test_a_wrong_request_starts_nothing(
    photos: Path, bundle: Path, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    (tmp_path / "mine").touch()
    out = tmp_path / options.pop("out", "out.csv")
    with pytest.raises(OptionError, match=words):
        here(photos, bundle, out, **{"engine": "ray"} | options)
    assert "ray" not in sys.modules
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_folder_is_an_output_of_ray_alone(photos: Path, bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="use a name that ends in"):
        here(photos, bundle, tmp_path / "scores")


class Shards:
    """What tasks are made of; no `Journal` needs to be written for it."""

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


def test_gpus_are_shared_evenly_and_cores_with_them() -> None:
    def node(**resources: float) -> dict[str, Any]:
        return {"Alive": True, "Resources": resources}

    nodes = [node(CPU=64), node(CPU=16, GPU=4), node(CPU=12, GPU=2)]
    assert ray_cluster._threads(nodes, 1) == 4
    assert ray_cluster._threads(nodes, 2) == 2
    assert ray_cluster._threads([node(CPU=1, GPU=4)], 1) == 1


def test_a_machine_without_the_images_says_so(tmp_path: Path) -> None:
    gone = str(tmp_path / "gone.jpg")
    job = ray_backend.RayJob("bundle", None, "cpu", "auto", 1, str(tmp_path / "none"), gone, {})
    done = ray_backend.RayWorker(job)({"shard": 0, "part": 0, "images": 1, "names": f'["{gone}"]'})
    assert done["fault"].startswith(f"OptionError:{gone} is not there: every machine")
    assert socket.gethostname() in done["fault"]
    assert done["rows"] == ""


class Near(ray_cluster.ActorPool):
    """A cluster that is this process."""

    def map(self, kind: type, job: Any, tasks: list[dict[str, Any]], say: Any) -> Any:
        yield from map(kind(job), tasks)


@pytest.fixture
def near(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(ray_cluster, "join", lambda *_: Near("cpu", 1, 1, {}))
    monkeypatch.setattr(ray_cluster, "share", lambda value: value)
    monkeypatch.setattr(ray_cluster, "shared", lambda value: value)
    return monkeypatch


@pytest.mark.parametrize(("fault", "kept"), [(WorkError, True), (OptionError, False)])
def test_what_was_found_is_kept_unless_other_things_must_be_asked_for(
    photos: Path,
    bundle: Path,
    tmp_path: Path,
    near: pytest.MonkeyPatch,
    fault: type[Exception],
    kept: bool,
) -> None:
    def failing(*_: object) -> None:
        raise fault("so it is")

    near.setattr(Near, "map", lambda *_: (failing() for _ in range(1)))
    with pytest.raises(fault, match="so it is"):
        here(photos, bundle, tmp_path / "out.csv", engine="ray")
    assert (tmp_path / ".out.csv.parts" / "inputs.jsonl").exists() == kept


def test_tasks_with_addresses_are_those_that_read_ahead(
    photos: Path, bundle: Path, tmp_path: Path, near: pytest.MonkeyPatch
) -> None:
    names = listed(tmp_path / "list.txt", photos, 96)
    table = here(names, bundle, tmp_path / "out.csv")
    lines = names.read_text().splitlines()
    lines[70] = f"file://{lines[70]}"
    names.write_text("\n".join(lines))
    taken: list[int] = []
    order = ray_backend.in_order

    def counted(work: Any, chunks: Any, threads: int) -> Any:
        taken.append(threads)
        return order(work, chunks, threads)

    near.setattr(ray_backend, "in_order", counted)
    there = here(names, bundle, tmp_path / "out.csv", engine="ray")
    assert there.replace(b"file://", b"") == table
    assert taken == [8]


@pytest.mark.slow
def test_a_machine_that_dies_changes_nothing(
    photos: Path, bundle: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    names = listed(tmp_path / "list.txt", photos, 3000)
    here(names, bundle, tmp_path / "here.csv")
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.ray_loss", bundle, names, tmp_path / "there.csv"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    if runtime.expected("auto") == runtime.PROVIDERS["cpu"]:  # actors have no GPU, as was claimed
        assert told["said"].pop(0).startswith("OptionError device = cuda: ")
    assert told["actors"] == 1
    assert 750 < told["at"] < 2900
    assert any(line.startswith("lost ") for line in told["said"])
    tables = []
    for name in ("here.csv", "there.csv"):
        with (tmp_path / name).open(newline="") as file:
            tables.append(list(csv.DictReader(file)))
    assert len(tables[0]) == len(tables[1]) == 3000
    for one, other in zip(*tables, strict=True):
        for column in ("path", "status", "label", "error", "applied", "views"):
            assert one[column] == other[column]
        if one["status"] == "ok":
            assert float(one["probability"]) == pytest.approx(float(other["probability"]), abs=1e-5)


@pytest.mark.slow
def test_on_this_machine_alone_ray_says_nothing_and_ctrl_c_ends_it_all(
    photos: Path, bundle: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    # Enough that most are to do when the first thousand are done.
    names = listed(tmp_path / "list.txt", photos, 9000)
    here(names, bundle, tmp_path / "here.parquet", embeddings=True, tta=2)
    names.write_text(names.read_text().replace("/", "file:///", 1))
    rest = ("--bundle", bundle, "--out", tmp_path / "scores", "--embeddings", "--tta", 2)
    words = command(names, *rest, "--workers", 2)
    with subprocess.Popen(
        words,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as running:
        whole = tmp_path / ".scores.parts"
        while not list(whole.glob("*.jsonl"))[1:]:  # inputs.jsonl, and the first shard
            assert running.poll() is None, running.communicate()
            time.sleep(0.05)
        family = psutil.Process(running.pid).children(recursive=True)
        os.killpg(running.pid, signal.SIGINT)  # as a terminal does
        _, said = running.communicate(timeout=60)
    assert running.returncode == 130
    assert ours(said) == ["fledge: interrupted"]
    assert len(family) > 5
    assert psutil.wait_procs(family, timeout=20)[1] == []

    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert ours(done.stderr) == []
    lines = done.stdout.splitlines()
    assert lines[0].startswith("going on: ")
    assert lines[-1] == f"wrote {tmp_path / 'scores'}"
    assert len(lines) == 5
    first, second = (
        [(one.path.removeprefix("file://"), one) for one in score_table.read(tmp_path / name)]
        for name in ("here.parquet", "scores")
    )
    assert len(first) == 9000
    for (path, one), (other_path, other) in zip(first, second, strict=True):
        assert (path, one.label, one.code) == (other_path, other.label, other.code)
        assert one.probability == pytest.approx(other.probability, abs=1e-5)


@pytest.mark.slow
def test_a_cluster_with_a_token_is_joined_by_who_has_it(
    photos: Path, bundle: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    names = listed(tmp_path / "list.txt", photos, 64)
    here(names, bundle, tmp_path / "here.csv")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment |= {"HOME": str(tmp_path), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}
    start = "import sys; from ray.scripts.scripts import main; main()"
    words = ["start", "--head", "--block", f"--port={port}", "--num-cpus=1"]
    words += ["--disable-usage-stats", "--include-dashboard=false"]
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(
            [sys.executable, "-c", start, *words], env=environment, stdout=log, stderr=log
        ) as head,
    ):
        try:
            while "Ray runtime started" not in (tmp_path / "log").read_text():
                assert head.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.2)
            rest = ("--bundle", bundle, "--out", tmp_path / "there.csv", "--device", "cpu")
            environment["RAY_ADDRESS"] = f"127.0.0.1:{port}"
            for change, code, said in (
                ({"RAY_AUTH_MODE": "disabled"}, 1, "needs RAY_AUTH_MODE=token"),
                ({"RAY_AUTH_TOKEN": "b" * 64}, 1, "is the token that of the head"),
                ({}, 0, ""),
            ):
                done = subprocess.run(
                    command(names, *rest),
                    env=environment | change,
                    capture_output=True,
                    text=True,
                    check=False,
                    timeout=120,
                )
                assert done.returncode == code, done.stderr
                assert said in done.stderr
        finally:
            family = psutil.Process(head.pid).children(recursive=True)
            head.terminate()
            head.wait(60)
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
    assert (tmp_path / "there.csv").read_bytes() == (tmp_path / "here.csv").read_bytes()
