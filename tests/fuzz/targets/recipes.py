"""Recipe files and overrides of options."""

from __future__ import annotations

import random
import tomllib
from collections.abc import Iterator
from pathlib import Path

from tests.fuzz import mutators
from tests.fuzz.guard import ROOT
from tests.fuzz.target import Target, put
from training.config import load
from training.config.overrides import SECTIONS

_NAMES = tuple(
    dict.fromkeys(
        [
            *(name for table in SECTIONS.values() for name in getattr(table, "model_fields", ())),
            *("size", "crop", "mean", "std", "background", "interpolation"),
        ]
    )
)
_SMALL = b"""name = "a"
arch = "resnet18"
seed = 3
batch_size = "auto"
[head]
dropout = [0.1, 0.2]
[preprocess]
size = 64
mean = [0.5, 0.5, 0.5]
[augment]
preset = "photos"
[[stage]]
name = "head"
lr = 1e-3
schedule = "cyclical"
cycles = 3
scale = "0.5 ** x + min(1, sin(x))"
[[stage]]
name = "all"
unfreeze = ["layer4.*", "layer3.*"]
lr = { low = 1e-5, high = 1e-3 }
schedule = "exp_range"
gamma = 0.999
[stage.augment]
flip = 0.5
"""


def seeds() -> Iterator[bytes]:
    for path in sorted((ROOT / "training" / "recipes").glob("*.toml")):
        yield mutators.join_files({"recipe.toml": path.read_bytes()})
    yield mutators.join_files({"recipe.toml": _SMALL})
    overrides = b'stage.head.lr=0.01\nname="b"\nbatch_size=4\nstage.0.lr="find"\naugment.flip=1'
    yield mutators.join_files({"recipe.toml": _SMALL, "overrides": overrides})
    yield mutators.join_files(
        {"recipe.toml": b"a.'b c'.\"d\\u00e9\" = '''x\ny''' # c\n[ x . y ]\nz=[1,{q=2},[3,],]\n"}
    )


def check(data: bytes) -> None:
    files = mutators.split_files(data)
    path = Path("recipe.toml")
    put(path, files.get("recipe.toml", b""))
    overrides = files.get("overrides", b"").decode("utf-8", "surrogateescape")
    recipe = load.read(path, [one for one in overrides.split("\n") if one])
    # What a run writes beside its checkpoints, and reads again.
    values = recipe.model_dump(mode="json", exclude={"preprocess"})
    values["preprocess"] = recipe.preprocess.to_dict()
    if load.parse(values, "again") != recipe:
        raise AssertionError("the recipe changes when it is written and read again")
    for stage in recipe.stage:
        recipe.preprocess_of(stage)
        recipe.augment_of(stage)
        if not stage.epochs >= 1:
            raise AssertionError("no epochs")


def _toml(rng: random.Random, data: bytes) -> bytes:
    """Change a value of the recipe by its structure."""
    import tomli_w

    try:
        values = tomllib.loads(data.decode())
        changed = mutators.change_tree(rng, values, _NAMES)
        return tomli_w.dumps(changed).encode("utf-8", "surrogatepass")
    except (ValueError, TypeError, AttributeError, RecursionError):
        return data


def _tokens(rng: random.Random, data: bytes) -> bytes:
    """Replace the value of one line."""
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    key, equals, _ = lines[at].partition(b"=")
    lines[at] = (key + equals if equals else b"x =") + rng.choice(_VALUES)
    return b"\n".join(lines)


_DEEP = 3000
_VALUES = (
    *(b"1", b"-1", b"0", b"1e999", b"nan", b"-inf", b"true", b'""', b"''", b"[]", b"{}", b'"find"'),
    *(b"1_0", b"0x10", b"9" * 5000, b"1979-05-27", b"07:32:00", b"1979-05-27T07:32:00Z", b"[[1]]"),
    *(
        b'"\\u0000"',
        b'"\\U0010ffff"',
        b'"""a\nb"""',
        b'"a',
        b"{a={b=1}}",
        b"[" * _DEEP + b"]" * _DEEP,
    ),
    *(
        b"{a=" * _DEEP + b"1" + b"}" * _DEEP,
        b"[1,2,3]",
        b"10000000000",
        b"4e-5",
        b'"all"',
        b'"auto"',
    ),
    *(
        b'"' + b"(" * 99 + b"x" + b")" * 99 + b'"',
        b'"x ** x ** x"',
        b'"exp(exp(exp(x)))"',
        b'"9e999*x"',
    ),
    *(
        b'"' + b"-" * 190 + b'x"',
        b'"lambda: x"',
        b'"1 if x else 2"',
        b'"x.y"',
        b'"min(x)"',
        b'"1j"',
    ),
    *(b'"\\t x"', b'"x\\nx"', b'"0x1 + 1_0"', b'"\\u0663"', b"10000", b"1.00001", b"100", b"9.9"),
)

_CHANGES = {
    "recipe.toml": mutators.one_of(_toml, _toml, _tokens, mutators.lines_change(_tokens)),
    "overrides": mutators.lines_change(_tokens),
}


def _check_formula(data: bytes) -> None:
    """A recipe with the input as its formula."""
    import json

    text = json.dumps(data.decode("utf-8", "replace"), ensure_ascii=False)
    text = text.replace("\x7f", "\\u007f")  # TOML wants an escape where JSON does not
    stage = f'name = "h"\nschedule = "cyclical"\ncycles = 2\nscale = {text}\n'
    load.read_text(f'name = "a"\narch = "b"\n[[stage]]\n{stage}', "formula")


def _formula_seeds() -> Iterator[bytes]:
    yield from (
        b"0.5 ** x",
        b"1 / (1 + 0.1 * x)",
        b"min(1, x, pi)",
        b"-sin(x) + exp(-x)",
        b"sqrt(2)",
    )


_FORMULA = (
    *(b"sin(", b"cos(", b"exp(", b"log(", b"sqrt(", b"abs(", b"min(", b"max(", b"pi", b"x"),
)
_FORMULA += (
    b" ** ",
    b"lambda",
    b"[x for x in x]",
    b"f'{x}'",
    b"not ",
    b"await ",
    b"...",
    b"(" * 99,
)

TARGETS = (
    Target(
        "recipe",
        check,
        seeds,
        mutators.files_change(_CHANGES),
        words=(*(name.encode() for name in _NAMES), b"[[stage]]\n", b"%% overrides\n"),
    ),
    Target("formula", _check_formula, _formula_seeds, words=_FORMULA),
)
