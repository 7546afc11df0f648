"""Changes of structured inputs: JSON, TOML, tables, several files in one input.

All changes depend on the random numbers alone. A change that does not fit the data returns it
unchanged; the fuzzer then changes bytes.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import random
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Change = Callable[[random.Random, bytes], bytes]

NUMBERS = (0, 1, -1, 2, 3, 255, 256, 999, 1000, 65_536, 2**31, 2**53, 2**63, 2**64, -(2**63))
FLOATS = (0.0, -0.0, 0.5, 1.0, 1.0000001, 1.1, -1e-9, 1e-320, 1e308, float("nan"), float("inf"))
TEXTS = (
    *("", "a", " ", "x" * 300, "é", "日本", "a\nb", "\r", "\t", "\0", "\x1b[31m", "\ufeff"),
    *(
        "\ud800",
        "\udcff",
        "\U0001f600",
        "/",
        "..",
        "../x",
        "/etc/passwd",
        "a/b",
        "CON",
        "-1",
        "1e9",
    ),
    *("nan", "true", "null", "0", "٣", "{}", "[]", "=1", "%s", "{0}", "\\", "'", '"', "a" * 5000),
)
_NESTED = "\u2063nested\u2063"


def value(rng: random.Random) -> Any:
    """Return a value of any kind."""
    return rng.choice(
        (
            lambda: None,
            lambda: rng.random() < 0.5,
            lambda: rng.choice(NUMBERS),
            lambda: rng.choice(FLOATS),
            lambda: rng.choice(TEXTS),
            lambda: [],
            lambda: {},
            lambda: [rng.choice(NUMBERS)] * rng.choice((1, 3, 300)),
            lambda: {rng.choice(TEXTS): rng.choice(NUMBERS)},
            lambda: [[rng.choice(TEXTS), rng.choice(FLOATS)]],
            lambda: 10 ** rng.choice((20, 400, 4299)),
            lambda: _NESTED,
        )
    )()


def _places(root: Any) -> list[tuple[Any, Any]]:
    """Return (container, key) of every value in a tree."""
    found, todo = [], [root]
    while todo:
        here = todo.pop()
        keys: Iterable[Any] = here if isinstance(here, dict) else range(len(here))
        for key in keys:
            found.append((here, key))
            if isinstance(here[key], (dict, list)):
                todo.append(here[key])
    return found


def change_tree(rng: random.Random, root: Any, words: Iterable[str] = ()) -> Any:
    """Change one to three values of a tree of dicts and lists; the tree itself is changed."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = _places(root) if isinstance(root, (dict, list)) else []
        if not places or rng.random() < 0.01:
            return value(rng)
        here, key = rng.choice(places)
        other, source = rng.choice(places)
        choice = rng.randrange(10)
        if choice < 4:
            here[key] = value(rng)
        elif choice == 4:
            here[key] = _copy(other[source])
        elif choice == 5:
            del here[key]
        elif choice == 6 and isinstance(here, dict):
            new = rng.choice([*words, *TEXTS]) if rng.random() < 0.7 else str(key) + "x"
            here[new] = here.pop(key)
        elif choice == 6:
            here.insert(key, _copy(here[key]))
        elif choice == 7 and isinstance(here, dict):
            here[rng.choice([*words, *TEXTS])] = value(rng)
        elif choice == 7:
            here.extend([_copy(here[key])] * rng.choice((1, 2, 100)))
        elif choice == 8:
            here[key] = _near(rng, here[key])
        else:
            here[key] = [here[key]] if rng.random() < 0.5 else {"a": here[key]}
    return root


def _copy(tree: Any) -> Any:
    return json.loads(json.dumps(tree)) if isinstance(tree, (dict, list)) else tree


def _near(rng: random.Random, old: Any) -> Any:
    """Return a value of the same kind."""
    if isinstance(old, bool):
        return not old
    if isinstance(old, int):
        return old + rng.choice((-1, 1, 256, -old, 2**32))
    if isinstance(old, float):
        return rng.choice((old + 1e-9, -old, old * 10, int(old) if abs(old) < 1e9 else 0))
    if isinstance(old, str):
        at = rng.randint(0, len(old))
        return old[:at] + rng.choice(TEXTS) + old[at + rng.randrange(2) :]
    return old


def dump_json(rng: random.Random, root: Any) -> bytes:
    indent = rng.choice((None, None, 1))
    text = json.dumps(root, indent=indent, ensure_ascii=rng.random() < 0.8)
    if _NESTED in text or json.dumps(_NESTED) in text:
        # Deeper than the recursion limit, or just below it.
        depth = rng.choice((2, 90, 330, 900, 1500, 20_000))
        opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
        inner = opening * depth + "1" + closing * depth
        text = text.replace(json.dumps(_NESTED), inner).replace(f'"{_NESTED}"', inner)
    return text.encode("utf-8", "surrogatepass")


def json_change(words: Iterable[str] = ()) -> Change:
    """Return a change of a JSON text. words: names that objects may have."""
    names = tuple(words)

    def change(rng: random.Random, data: bytes) -> bytes:
        try:
            root = json.loads(data)
        except (ValueError, RecursionError):
            return data
        with contextlib.suppress(RecursionError, ValueError, TypeError):
            return dump_json(rng, change_tree(rng, root, names))
        return data

    return change


def lines_change(inner: Change | None = None) -> Change:
    """Return a change of a text by whole lines, or of one line by `inner`."""

    def change(rng: random.Random, data: bytes) -> bytes:
        lines = data.split(b"\n")
        at, to = rng.randrange(len(lines)), rng.randrange(len(lines))
        if inner and rng.random() < 0.7:
            lines[at] = inner(rng, lines[at])
            return b"\n".join(lines)
        choice = rng.randrange(5)
        if choice == 0:
            del lines[at]
        elif choice == 1:
            lines[to:to] = [lines[at]] * rng.choice((1, 1, 3, 1500))
        elif choice == 2:
            lines[at], lines[to] = lines[to], lines[at]
        elif choice == 3:
            lines[at] = lines[at][: rng.randint(0, len(lines[at]))]
        else:
            lines[at] += rng.choice((b"\r", b"\0", b" ", b'"', b"\xff", b",", b";", b"\t", b"\x0c"))
        return b"\n".join(lines)

    return change


def csv_change(words: Iterable[str] = ()) -> Change:
    """Return a change of one cell of a CSV text."""
    names = tuple(words)

    def change(rng: random.Random, data: bytes) -> bytes:
        text = data.decode("utf-8", "surrogateescape")
        try:
            rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
        except csv.Error:
            return data
        if not rows:
            return data
        row = rng.choice(rows[:1] if rng.random() < 0.2 else rows)
        at = rng.randrange(len(row))
        choice = rng.randrange(5)
        if choice == 0:
            del row[at]
        elif choice == 1:
            row.insert(at, rng.choice([*names, *TEXTS]))
        elif choice == 2:
            row[at] = rng.choice([*names, *TEXTS])
        elif choice == 3:
            row[at] = dump_json(rng, value(rng)).decode("utf-8", "surrogateescape")
        else:
            row[at] = str(_near(rng, row[at]))
        out = io.StringIO(newline="")
        try:
            csv.writer(out, lineterminator=rng.choice(("\n", "\r\n"))).writerows(rows)
        except csv.Error:
            return data
        return out.getvalue().encode(
            "utf-8", "surrogateescape" if _escaped(out) else "surrogatepass"
        )

    return change


def _escaped(out: io.StringIO) -> bool:
    return all(not 0xD800 <= ord(char) < 0xDC80 for char in out.getvalue())


def one_of(*changes: Change) -> Change:
    def change(rng: random.Random, data: bytes) -> bytes:
        return rng.choice(changes)(rng, data)

    return change


_SECTION = re.compile(rb"^%% ([A-Za-z0-9_.]+)\n", re.MULTILINE)


def join_files(files: Mapping[str, bytes]) -> bytes:
    """Return one input of several files: a line "%% NAME", then the content and a line break."""
    return b"".join(b"%%%% %s\n%s\n" % (name.encode(), body) for name, body in files.items())


def split_files(data: bytes) -> dict[str, bytes]:
    """Return the files of an input that `join_files` built."""
    pieces = _SECTION.split(data)[1:]
    names = [name.decode() for name in pieces[::2]]
    return {name: body.removesuffix(b"\n") for name, body in zip(names, pieces[1::2], strict=True)}


def files_change(changes: Mapping[str, Change]) -> Change:
    """Return a change of one file of an input. changes: by the end of the file's name."""

    def change(rng: random.Random, data: bytes) -> bytes:
        files = split_files(data)
        if not files:
            return data
        name = rng.choice(list(files))
        if rng.random() < 0.03:
            del files[name]
            return join_files(files)
        found = next((one for end, one in changes.items() if name.endswith(end)), None)
        if found is None:
            return data
        files[name] = found(rng, files[name])
        return join_files(files)

    return change
