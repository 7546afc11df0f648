"""The documentation agrees with the code: commands, Python code, tables and links."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fledge
from serving import errors
from serving.bundle.manifest import Manifest
from serving.http import problems
from serving.http.messages import Request
from serving.imaging.decode import decode
from serving.imaging.preprocess import DECODES, FITS
from serving.inference.load import open_predictor
from serving.settings import Settings
from tests.robustness.file_builders import into_jpeg, segment
from tests.support.tiny_bundle import photo, tiny_bundle

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        *sorted((ROOT / "docs").glob("*.md")),
    )
}
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
QUICK = "quick"


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL)


def commands(page: str, name: str) -> list[list[str]]:
    """The arguments of every command called `name` in `sh` blocks and in backticks."""
    lines = "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    lines += re.findall(r"(?<!`)`([^`\n]+)`(?!`)", PAGES[page])
    words = (shlex.split(re.sub(r"\[[^\]]*…\]", "", line)) for line in lines if name in line)
    return [line for line in words if line[1:] and line[0].removeprefix(".venv/bin/") == name]


def rows(page: str, heading: str = "") -> list[list[str]]:
    """The cells of the tables after a heading, without backticks."""
    text = PAGES[page].partition(heading)[2] if heading else PAGES[page]
    lines = re.findall(r"^\| (`.*) \|$", text, re.MULTILINE)
    return [[cell.strip().strip("`") for cell in line.split(" | ")] for line in lines]


def every(name: str) -> list[tuple[str, list[str]]]:
    return [(page, words) for page in PAGES for words in commands(page, name)]


def test_the_pages_contain_commands_and_python_code() -> None:
    assert {"README.md", "docs/recipe.md", "docs/bundle.md", "docs/design.md"} <= set(PAGES)
    assert len(every("make")) > 20
    assert len(every("fledge")) > 20
    assert blocks("docs/bundle.md", "python")


@pytest.mark.parametrize("page", PAGES)
def test_the_targets_of_relative_links_exist(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if not re.match(r"[a-z]+:|#", target):
            assert ((ROOT / page).parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_documented_make_targets_and_variables_exist(page: str) -> None:
    for _, target, *given in commands(page, "make"):
        assert target in TARGETS
        for word in given:
            variable = word.partition("=")[0]
            assert re.search(rf"\$\((call quote,)?{variable}\)", MAKEFILE), word


@pytest.mark.parametrize("page", PAGES)
def test_fledge_parses_the_documented_commands(page: str) -> None:
    for words in commands(page, "fledge"):
        if words[1:] in (["--help"], ["--version"]):
            continue
        if len(words) == 2:  # the name of a subcommand without arguments
            assert words[1] in verbs()
            continue
        assert_understood(words[1:])


def test_fledge_parses_the_args_of_documented_make_train_commands() -> None:
    told = [word for _, words in every("make") for word in words if word.startswith("ARGS=-")]
    assert told
    for _, words in every("make"):
        given = next((word[5:] for word in words if word.startswith("ARGS=")), "")
        if words[1:2] == ["train"] and "…" not in given:
            assert_understood(["train", QUICK, "--data", "photos", *shlex.split(given)])


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("how", DECODES)
def test_python_blocks_run(
    page: str,
    how: str,
    fit: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_bundle(tmp_path / "bundle", decode=how, fit=fit)
    predictor = open_predictor(tmp_path / "bundle", device="cpu")
    for turn, size in enumerate(SIZES, 1):
        data = turned(photo(7, size), turn)
        (tmp_path / "photo.jpg").write_bytes(data)
        for block in blocks(page, "python"):
            found: dict[str, object] = {}
            exec(compile(block, page, "exec"), found)
            expected = predictor.predict([predictor.prepare(data)])[0].probabilities
            difference = np.abs(np.asarray(found["probabilities"]) - expected).max()
            assert difference < 1e-6, (turn, size)
            assert capsys.readouterr().out.startswith(predictor.manifest.labels[expected.argmax()])


SIZES = ((97, 60), (497, 361), (361, 499), (643, 645), (1100, 90), (455, 1201), (1203, 901), (7, 3))
"""Of a photo of each EXIF orientation; many leave a rest when they are reduced."""


def turned(data: bytes, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return into_jpeg(data, segment(0xE1, exif.tobytes()))


def test_answers_have_the_documented_fields(tmp_path: Path) -> None:
    (in_readme,) = map(json.loads, blocks("README.md", "json"))
    answer, problem = map(json.loads, blocks("docs/http.md", "json"))
    predictor = open_predictor(tiny_bundle(tmp_path / "bundle"), device="cpu")
    real = predictor.answer(predictor.predict([predictor.prepare(photo(7))])[0])
    assert list(answer) == list(in_readme) == list(real)
    assert list(answer["predictions"][0]) == list(real["predictions"][0])
    page = b"<!DOCTYPE html><html></html>"
    with pytest.raises(errors.NotAnImage) as caught:
        decode(page)
    headers = {b"host": b"localhost:3000"}
    request = Request("POST", "/predict", b"", headers, _no_receive, "")
    real = problems.problem(problems.explain(caught.value, page, request), "")
    real["detail"] = real["detail"].replace(", HEIC, JPEG XL", "")  # with the extras
    assert problem == real


async def _no_receive() -> dict[str, object]:
    raise AssertionError


def test_the_http_page_lists_every_error() -> None:
    told = dict(row[:2] for row in rows("docs/http.md", "## Errors") if row[1].isdigit())
    classes = {*below(errors.RequestError), *below(errors.ImageError), *below(errors.ServiceError)}
    classes -= {errors.ImageError, errors.ServiceError, *below(errors.DataError)}  # never there
    classes |= {errors.WorkError, *problems.HttpError.__subclasses__()}
    real = {kind.code: str(kind.http_status) for kind in classes}
    assert told == {**real, "internal": "500"}


def test_the_http_page_lists_every_setting() -> None:
    asked: set[str] = set()

    class Environment(dict[str, str]):
        def get(self, name, default=None):
            asked.add(name)
            return default

    settings = Settings.from_env(Environment())
    told = {row[0]: row[-1] for row in rows("docs/http.md", "## Settings") if "FLEDGE_" in row[0]}
    assert set(told) == asked
    plain = ("device", "precision", "workers", "max_queue", "max_bytes", "max_pixels", "deadline")
    for name in plain:
        assert told[f"FLEDGE_{name.upper()}"] == str(getattr(settings, name))


def test_the_recipe_page_lists_every_option_with_its_default() -> None:
    told = {row[0]: row[1] for row in rows("docs/recipe.md") if len(row) > 2}
    stated = {
        name: default if default == "required" else tomllib.loads(f"v = {default}")["v"]
        for name, default in told.items()
    }
    assert stated == dict(options())


def test_the_recipes_in_the_recipe_page_are_valid() -> None:
    from training.config import load as config

    assert blocks("docs/recipe.md", "toml")
    for block in blocks("docs/recipe.md", "toml"):
        config.parse(tomllib.loads(block), "docs/recipe.md")


def test_the_bundle_page_lists_every_field_of_the_manifest() -> None:
    told = [row[0] for row in rows("docs/bundle.md", "## The manifest")]
    assert told == [field.alias or name for name, field in Manifest.model_fields.items()]


def test_the_design_page_names_definitions_that_exist() -> None:
    """Each link of the form [`name`](../file.py) leads to a definition of that name."""
    links = re.findall(r"\[`([\w.]+)`\]\(\.\./([\w/]+\.py)\)", PAGES["docs/design.md"])
    assert len(links) > 60
    for name, path in links:
        assert name in definitions(ROOT / path), (name, path)


@pytest.mark.parametrize("area", ["serving", "training", "export"])
def test_the_design_page_names_every_package_and_files_that_exist(area: str) -> None:
    section = PAGES["docs/design.md"].partition(f"\n## {area}/")[2].partition("\n## ")[0]
    packages = {path.parent.name for path in (ROOT / area).glob("*/__init__.py")}
    assert packages == set(re.findall(r"\*\*(\w+)/\*\*", section))
    for name in re.findall(r"(\w+\.py)", section):
        assert list((ROOT / area).rglob(name)), name


def definitions(path: Path) -> set[str]:
    """Names of a module's classes, functions, methods and assigned constants."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
            body = node.body if isinstance(node, ast.ClassDef) else []
            found |= {
                f"{node.name}.{item.name}"
                for item in body
                if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)
            }
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found


def assert_understood(words: list[str]) -> None:
    """`fledge` parses the arguments; overrides of a recipe that exists are valid for it."""
    known, rest = fledge._parser().parse_known_args(words)
    assert rest == []
    if not hasattr(known, "overrides"):
        return
    from training.config import load as config
    from training.config import shipped

    if known.recipe and shipped.find(known.recipe).is_file():
        config.read(known.recipe, known.overrides)
    else:
        assert all(re.fullmatch(r"[\w.]+=.+", word) for word in known.overrides), known.overrides


def verbs() -> set[str]:
    actions = fledge._parser()._actions
    (found,) = (a.choices for a in actions if isinstance(a, argparse._SubParsersAction))
    return set(found)


def below(kind: type) -> Iterator[type]:
    yield kind
    for child in kind.__subclasses__():
        yield from below(child)


def options() -> Iterator[tuple[str, object]]:
    """(dotted name, default) of every option of a recipe."""
    from pydantic_core import PydanticUndefined

    from training.config import schema as sections

    def plain(value: object) -> object:
        if value is PydanticUndefined:
            return "required"
        return list(value) if isinstance(value, tuple) else value

    for name, field in sections.Recipe.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if name == "stage":
            fields = sections.Stage.model_fields.items()
            defaults = ((key, item.get_default(call_default_factory=True)) for key, item in fields)
            yield from ((f"stage.{key}", plain(value)) for key, value in defaults)
        elif dataclasses.is_dataclass(default):
            yield from ((f"{name}.{k}", plain(v)) for k, v in dataclasses.asdict(default).items())
        elif hasattr(default, "model_dump"):
            yield from ((f"{name}.{k}", plain(v)) for k, v in default.model_dump().items())
        else:
            yield name, plain(default)
