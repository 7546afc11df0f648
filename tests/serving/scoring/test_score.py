"""Batch scoring: a row for every input, in order, with the answer of the predictor."""

import csv
import io
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from serving.bundle.manifest import measured_parallelism
from serving.bundle.storage import read
from serving.errors import (
    BundleError,
    DataError,
    FledgeError,
    GateError,
    OptionError,
    WorkError,
)
from serving.inference import load
from serving.inference.load import open_predictor
from serving.inference.predictor import Predictor
from serving.inference.runtime import OnnxRuntime
from serving.inputs import sources
from serving.inputs.compression import MAX_FILE
from serving.scoring import journal, score, scorer, table
from serving.scoring.options import ScoringOptions
from serving.scoring.scorer import Chunk, ScoredChunk
from serving.scoring.summary import Summary, read_classes
from serving.utils import progress
from serving.utils.natural_sort import natural
from tests.support.tiny_bundle import altered, photo, tiny_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "b", classes=7)


@pytest.fixture(scope="module")
def predictor(bundle: Path) -> Predictor:
    return open_predictor(bundle, device="cpu")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve photos in three folders, and a broken file of each kind among them."""
    root = tmp_path / "photos"
    for seed in range(12):
        path = root / ("", "a", "a/b")[seed % 3] / f"{seed}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(seed))
    (root / "1x-text.jpg").write_bytes(b"hello")
    (root / "2x-empty.png").write_bytes(b"")
    (root / "a" / "3x-cut.jpg").write_bytes(photo(3)[:900])
    (root / "a" / "4x-unsupported.webp").write_bytes(b"8BPS" + b"\0" * 60)
    (root / "5x-gone.jpg").symlink_to(root / "nowhere.jpg")
    (root / "6x-self.jpg").symlink_to(root / "6x-self.jpg")
    os.mkfifo(root / "7x-pipe.jpg")
    return root


BROKEN = {
    "1x-text.jpg": "not-an-image",
    "2x-empty.png": "no-image",
    "3x-cut.jpg": "broken-image",
    "4x-unsupported.webp": "unsupported-format",
    "5x-gone.jpg": "broken-image",
    "6x-self.jpg": "broken-image",
    "7x-pipe.jpg": "broken-image",
}


def run(folder: Path, bundle: Path, out: Path, **options: Any) -> tuple[Summary, list[dict]]:
    scoring = ScoringOptions(device="cpu", **options)
    summary = score.score([str(folder)], bundle, out, scoring, log=lambda line: None)
    return summary, rows(out)


def rows(out: Path) -> list[dict[str, Any]]:
    if out.suffix == ".jsonl":
        return [json.loads(line) for line in out.read_text().splitlines()]
    with out.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@pytest.mark.parametrize("tta", [0, 4])
def test_each_input_is_a_row_with_the_answer_of_the_predictor(
    photos: Path, bundle: Path, predictor: Predictor, tmp_path: Path, suffix: str, tta: int
) -> None:
    summary, found = run(photos, bundle, tmp_path / f"out{suffix}", tta=tta, top_k=3)
    assert len(found) == 12 + len(BROKEN)
    assert len({row["path"] for row in found}) == len(found)
    assert list(found[0]) == [
        "path",
        "status",
        "label",
        "probability",
        "confident",
        "top_k",
        "views",
        "applied",
        "error",
    ]
    for row in found:
        name = Path(row["path"]).name
        if name in BROKEN:
            assert row["status"] == "error"
            assert row["error"].startswith(BROKEN[name] + ": ")
            assert not any(row[key] for key in ("label", "probability", "top_k", "views"))
            continue
        prepared = predictor.prepare(Path(row["path"]).read_bytes(), tta)
        answer = predictor.answer(predictor.predict([prepared])[0], 3)
        expected = [[item["label"], item["probability"]] for item in answer["predictions"]]
        top_k = row["top_k"] if suffix == ".jsonl" else json.loads(row["top_k"])
        assert (row["status"], row["error"]) == ("ok", "")
        assert top_k == expected
        assert (row["label"], float(row["probability"])) == tuple(expected[0])
        assert int(row["views"]) == max(1, tta)
    assert (summary.images, summary.scored) == (len(found), 12)
    assert sum(summary.labels.values()) == 12
    assert summary.errors == {
        code: list(BROKEN.values()).count(code) for code in dict.fromkeys(summary.errors)
    }


def test_error_codes_equal_those_of_the_service(
    photos: Path, bundle: Path, predictor: Predictor, tmp_path: Path
) -> None:
    _, found = run(photos, bundle, tmp_path / "out.csv")
    for row in found:
        if row["status"] == "error" and Path(row["path"]).is_file():
            with pytest.raises(FledgeError) as caught:
                predictor.prepare(Path(row["path"]).read_bytes())
            assert row["error"] == f"{caught.value.code}: {caught.value}"


def test_order_is_natural_and_depth_first(photos: Path, bundle: Path, tmp_path: Path) -> None:
    _, found = run(photos, bundle, tmp_path / "out.csv")
    names = [row["path"].removeprefix(f"{photos}/") for row in found]
    good = [name for name in names if Path(name).name not in BROKEN]
    assert good == [
        *("0.jpg", "3.jpg", "6.jpg", "9.jpg"),
        *("a/1.jpg", "a/4.jpg", "a/7.jpg", "a/10.jpg"),
        *("a/b/2.jpg", "a/b/5.jpg", "a/b/8.jpg", "a/b/11.jpg"),
    ]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_the_number_of_workers_changes_no_byte(
    photos: Path, bundle: Path, tmp_path: Path, suffix: str
) -> None:
    outs = [tmp_path / f"{workers}{suffix}" for workers in (1, 4, 16)]
    for out in outs:
        run(photos, bundle, out, workers=int(out.stem), tta=2)
    assert len({out.read_bytes() for out in outs}) == 1


def test_a_slow_first_image_does_not_change_the_order(
    photos: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, expected = run(photos, bundle, tmp_path / "a.csv")
    load = sources.Reader.load

    def slow(self: sources.Reader, name: str) -> bytes:
        time.sleep(0.1 if name.endswith("/0.jpg") else 0)
        return load(self, name)

    monkeypatch.setattr(sources.Reader, "load", slow)
    monkeypatch.setattr(scorer, "_CHUNK", 1)
    assert run(photos, bundle, tmp_path / "b.csv", workers=4)[1] == expected


def test_no_more_than_a_window_of_images_is_ahead_of_the_table() -> None:
    started: list[int] = []

    def work(chunk: Chunk) -> ScoredChunk:
        started.append(chunk.shard)
        return ScoredChunk(chunk, [], None)

    chunks = (Chunk(number, [], True) for number in range(1000))
    results = scorer.score_chunks(work, chunks, workers=2)  # type: ignore[arg-type]
    for number in range(100):
        assert next(results).chunk.shard == number
        assert len(started) <= number + 2 + 2 * scorer._WINDOW
    results.close()
    assert len(started) < 200


def test_views_and_pixel_conversions_are_columns(bundle: Path, tmp_path: Path) -> None:
    tags = Image.Exif()
    tags[0x0112] = 6
    Image.new("RGBA", (40, 30), (1, 2, 3, 9)).save(tmp_path / "x.png", exif=tags)
    _, (row,) = run(tmp_path / "x.png", bundle, tmp_path / "out.csv", tta=1)
    assert row["applied"] == "alpha-on-background;exif-orientation"
    assert row["confident"] == ""


def test_top_k_is_at_most_the_number_of_classes(photos: Path, bundle: Path, tmp_path: Path) -> None:
    _, found = run(photos / "a" / "1.jpg", bundle, tmp_path / "out.jsonl", top_k=100)
    assert len(found[0]["top_k"]) == 7
    assert sum(probability for _, probability in found[0]["top_k"]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("limit", "passes"),
    [("7", True), ("6", False), ("0", False), ("37%", True), ("36.8%", False), ("100%", True)],
)
def test_max_errors_fails_the_run_after_the_table_is_complete(
    photos: Path, bundle: Path, tmp_path: Path, limit: str, passes: bool
) -> None:
    out = tmp_path / "out.csv"
    if passes:
        run(photos, bundle, out, max_errors=limit)
    else:
        with pytest.raises(GateError, match=f"7 of 19 .*--max-errors {limit}"):
            run(photos, bundle, out, max_errors=limit)
    assert len(rows(out)) == 19


def test_a_job_without_any_prediction_fails_with_a_complete_table(
    bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / "in" / f"{number}.jpg").write_text("hello")
    with pytest.raises(WorkError, match="not one of 3 images"):
        run(tmp_path / "in", bundle, tmp_path / "out.csv")
    assert [row["status"] for row in rows(tmp_path / "out.csv")] == ["error"] * 3


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"out": "out.xls"}, OptionError, r"out\.xls: .*\.csv, \.jsonl, \.parquet"),
        ({"out": "out"}, OptionError, r"\.csv, \.jsonl"),
        ({"out": "none/out.csv"}, OptionError, "no folder .*none; make it"),
        ({"out": "folder.csv"}, OptionError, "a folder; name a file"),
        ({"inputs": "empty"}, DataError, r"empty: no images found; .*\.jpg"),
        ({"inputs": "missing"}, DataError, "missing: not there"),
        ({"inputs": "empty.txt"}, DataError, "lists no images"),
        ({"bundle": "missing"}, BundleError, "fledge export"),
        ({"tta": 11}, OptionError, "tta = 11"),
        ({"top_k": 0}, OptionError, "--top-k 0"),
        ({"workers": 0}, OptionError, "--workers 0"),
        ({"max_errors": "-1"}, OptionError, "--max-errors -1"),
        ({"max_errors": "101%"}, OptionError, "--max-errors 101%"),
        ({"max_errors": "few"}, OptionError, "--max-errors few"),
        ({"precision": "int8"}, OptionError, "int8"),
        ({"device": "tpu"}, OptionError, "tpu"),
    ],
)
def test_a_wrong_option_is_one_line_and_leaves_no_file(
    photos: Path,
    bundle: Path,
    tmp_path: Path,
    options: dict[str, Any],
    kind: type[Exception],
    words: str,
) -> None:
    for name in ("empty", "folder.csv", "work"):
        (tmp_path / name).mkdir()
    (tmp_path / "empty.txt").write_text("\n \n")
    places = {"inputs": photos, "bundle": bundle, "out": tmp_path / "work" / "out.csv"}
    for name in places.keys() & options.keys():
        places[name] = tmp_path / options[name]
    before = sorted(tmp_path.rglob("*"))
    rest = {"device": "cpu"} | {key: value for key, value in options.items() if key not in places}
    inputs = [str(places.pop("inputs"))]
    with pytest.raises(kind, match=words) as caught:
        score.score(inputs, **places, options=ScoringOptions(**rest))
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("fault", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_keeps_the_older_table_and_is_resumed(
    photos: Path,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: type[BaseException],
) -> None:
    out = tmp_path / "work" / "out.csv"
    out.parent.mkdir()
    run(photos, bundle, tmp_path / "expected.csv")
    monkeypatch.setattr(journal, "SIZE", 4)
    write, calls = journal.ScoringJournal.write, []

    def interrupted(self: journal.ScoringJournal, number: int, *rows: Any) -> None:
        calls.append(number)
        if len(calls) == 3:
            raise fault
        write(self, number, *rows)

    monkeypatch.setattr(journal.ScoringJournal, "write", interrupted)
    out.write_text("an older table")
    with pytest.raises(fault):
        run(photos, bundle, out)
    assert out.read_text() == "an older table"
    run(photos, bundle, out)
    assert calls == [0, 1, 2, 2, 3, 4]
    assert out.read_bytes() == (tmp_path / "expected.csv").read_bytes()
    assert sorted(path.name for path in out.parent.iterdir()) == ["out.csv", "out.summary.json"]


def test_a_full_disk_is_a_failure_in_one_line(
    photos: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "work").mkdir()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WorkError, match=r"out\.csv: No space left on device"):
        run(photos, bundle, tmp_path / "work" / "out.csv")
    assert list((tmp_path / "work").iterdir()) == []


def test_a_table_appears_only_when_complete(
    photos: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, existed, append = tmp_path / "out.csv", [], table.TableFile.append

    def recorded(self: table.TableFile, *rows: Any) -> None:
        existed.append(out.exists())
        append(self, *rows)

    monkeypatch.setattr(table.TableFile, "append", recorded)
    run(photos, bundle, out)
    assert existed == [False]
    names = ["out.csv", "out.summary.json", "photos"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


AWKWARD = (
    "comma, and space.jpg",
    'quote".jpg',
    "line\nbreak.jpg",
    "return\rhere.jpg",
    "semi;colon.jpg",
    "ünïcode-花.jpg",
    os.fsdecode(b"latin-\xfc\xff.jpg"),
    "=SUM(A1).jpg",
    "UPPER.JPEG",
)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_any_file_name_is_written_unchanged(bundle: Path, tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number, name in enumerate(AWKWARD):
        (folder / name).write_bytes(photo(number))
    _, found = run(folder, bundle, tmp_path / f"out{suffix}")
    assert {os.fsencode(row["path"]) for row in found} == {
        os.fsencode(folder / name) for name in AWKWARD
    }
    assert all(row["status"] == "ok" for row in found)


def test_hidden_files_and_other_files_are_left_out(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for name in ("x.jpg", "._x.jpg", ".hidden.jpg", ".git/y.jpg", "notes.txt", "sub.jpg/z.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(photo(1))
    _, found = run(folder, bundle, tmp_path / "out.csv")
    names = [row["path"].removeprefix(f"{folder}/") for row in found]
    assert names == ["sub.jpg/z.png", "x.jpg"]


def test_symlinks_are_followed_except_in_loops(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "x.jpg").write_bytes(photo(1))
    (folder / "a" / "up").symlink_to(folder)
    (folder / "b").symlink_to(folder / "a")
    (folder / "c.jpg").symlink_to(folder / "a" / "x.jpg")
    _, found = run(folder, bundle, tmp_path / "out.csv")
    names = [row["path"].removeprefix(f"{folder}/") for row in found]
    assert names == ["a/x.jpg", "b/x.jpg", "c.jpg"]
    assert len({row["probability"] for row in found}) == 1


def test_an_unreadable_folder_is_logged_and_the_rest_scored(
    photos: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def refusing(folder: Any) -> Any:
        if os.fspath(folder).endswith("a/b"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refusing)
    lines: list[str] = []
    options = ScoringOptions(device="cpu")
    summary = score.score([str(photos)], bundle, tmp_path / "out.csv", options, log=lines.append)
    assert summary.scored == 8
    assert sum("a/b: Permission denied" in line for line in lines) == 1
    assert summary.skipped == 1
    assert "skipped: 1" in lines[-1]


def test_a_text_list_gives_a_row_for_every_line(
    photos: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos)
    paths = ["a/1.jpg", "0.jpg", "gone.jpg", "a/1.jpg", "a", "nul\0.jpg", str(photos / "3.jpg")]
    (tmp_path / "list.txt").write_text("\ufeff" + "\r\n".join(paths) + "\r\n\r\n")
    _, found = run(tmp_path / "list.txt", bundle, tmp_path / "out.jsonl")
    assert [row["path"] for row in found] == paths
    assert [row["error"].split(":")[0] for row in found] == [
        *("", "", "broken-image", ""),
        *("broken-image", "broken-image", ""),
    ]
    assert found[0] == found[3]


def test_a_too_large_file_is_refused_without_reading(
    photos: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (photos / "8x-giant.jpg").open("wb") as file:
        file.truncate(MAX_FILE + 1)
    summary, _ = run(photos, bundle, tmp_path / "out.csv")
    assert summary.errors["too-large"] == 1


def test_natural_order_is_total_and_reads_numbers() -> None:
    names = ["10.jpg", "9.jpg", "09.jpg", "a10b2", "a10b10", "a9", "", "b", "1a", "a"]
    assert sorted(names, key=natural) == [
        *("", "1a", "09.jpg", "9.jpg", "10.jpg", "a", "a9", "a10b2", "a10b10", "b")
    ]
    assert len({repr(natural(name)) for name in names}) == len(names)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_the_summary_has_the_class_names_in_the_order_of_the_probabilities(
    photos: Path, bundle: Path, predictor: Predictor, tmp_path: Path, suffix: str
) -> None:
    out = tmp_path / f"scores{suffix}"
    _, found = run(photos / "a", bundle, out, probabilities=True)
    summary = json.loads((tmp_path / "scores.summary.json").read_text())
    assert summary["classes"] == list(predictor.manifest.labels)
    assert read_classes(out) == tuple(predictor.manifest.labels)
    for row in found:
        if row["status"] == "ok":
            probabilities = row["probabilities"]
            if suffix == ".csv":
                probabilities = json.loads(probabilities)
            assert summary["classes"][max(range(7), key=probabilities.__getitem__)] == row["label"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"classes": {}}', '{"classes": [1]}'])
def test_a_summary_without_class_names_has_none(tmp_path: Path, text: str) -> None:
    assert read_classes(tmp_path / "scores.csv") is None
    (tmp_path / "scores.summary.json").write_text(text)
    assert read_classes(tmp_path / "scores.csv") is None
    (tmp_path / "scores.summary.json").write_text('{"classes": ["b", "a"]}')
    assert read_classes(tmp_path / "scores") == ("b", "a")


def test_the_summary_has_at_most_three_lines() -> None:
    summary = Summary(10, 7, {"broken-image": 2, "no-image": 1}, {"rose": 7}, 2.0, 10)
    assert str(summary).splitlines() == [
        "10 images in 2.0 s, 5 images/s",
        "scored: 7 (rose 7)",
        "errors: 3 (broken-image 2, no-image 1)",
    ]
    many = Summary(900, 900, {}, {str(i): 1 for i in range(900)}, 1, 900)
    assert len(str(many).splitlines()) == 2


def test_without_a_terminal_a_plain_line_comes_every_few_seconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with progress.Progress(100, stream=stream) as shown:
        for _ in range(100):
            now[0] += 0.5
            shown.step(failed=False)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "20 of 100 images, 0 errors, 2 images/s, 40 s left"
    assert len(lines) == 5


def test_on_a_terminal_a_bar_shows_rate_and_errors() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with progress.Progress(3, stream=stream) as shown:
        for failed in (False, True, False):
            shown.step(failed)
    assert "3/3" in stream.getvalue()
    assert "1 errors" in stream.getvalue()


@pytest.mark.parametrize(
    ("tuned", "workers", "runs", "threads"),
    [
        ({"workers": 1, "threads": 3}, None, 1, 3),
        ({"workers": 2, "threads": 1}, None, 2, 1),
        ({"workers": 1, "threads": 3}, 4, 4, 1),  # --workers takes precedence
    ],
)
def test_concurrent_runs_are_limited_as_measured(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tuned: dict[str, int],
    workers: int | None,
    runs: int,
    threads: int,
) -> None:
    folder = tiny_bundle(tmp_path / "b", classes=7)
    altered(folder, tuning={"cpu": {"cores": 5, "throughput": {"fp32": tuned}}})
    for module in (score, load):
        monkeypatch.setattr(module, "cores", lambda: 5)
    run_graph, opened, now, most = OnnxRuntime.run, OnnxRuntime.__init__, [], 0
    given: list[int] = []

    def counted(self: OnnxRuntime, pixels: Any) -> Any:
        nonlocal most
        now.append(1)
        most = max(most, len(now))
        time.sleep(0.02)  # so that allowed runs overlap
        try:
            return run_graph(self, pixels)
        finally:
            now.pop()

    def watched(self: OnnxRuntime, *args: Any, **options: Any) -> None:
        given.append(options["threads"])
        opened(self, *args, **options)

    monkeypatch.setattr(scorer, "_CHUNK", 1)
    monkeypatch.setattr(OnnxRuntime, "__init__", watched)
    monkeypatch.setattr(OnnxRuntime, "run", counted)
    run(photos, folder, tmp_path / "out.csv", workers=workers)
    assert (most, given) == (runs, [threads])


def test_a_tuning_of_another_number_of_cores_is_ignored(bundle: Path) -> None:
    manifest = read(bundle).manifest
    assert measured_parallelism(manifest, "fp32", 6) == (6, 1)
    best = {"int8": {"workers": 1, "threads": 4, "batch": 8}}
    tuning = {"cpu": {"cores": 4, "throughput": best}}
    known = manifest.model_copy(update={"tuning": tuning})
    assert measured_parallelism(known, "int8", 4) == (1, 4)
    assert measured_parallelism(known, "int8", 6) == (6, 1)
    assert measured_parallelism(known, "fp32", 4) == (4, 1)
