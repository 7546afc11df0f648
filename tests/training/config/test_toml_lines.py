import tomllib
from pathlib import Path

import pytest

from training.config.toml_lines import lines_of

ODD = r'''# a comment with [brackets] and = signs
title = "a # is no comment, nor is \" an end" # but this is
"quoted key" = 1
'single.quoted' = 2
site."dotted.key".x = 3
long = """
[no.table]
x = 1 \""" still in it
"""
literal = \'\'\'
[[neither]] \'\'\'
five = """""two quotes inside"""""
empty = ""
when = 1979-05-27T07:32:00Z
many = [
  1, # one, two
  [2, 3],
  "]",
]   # done
inline = { a = 1, b.c = [ { d = 2 }, { e = "}" } ] }

[table]
[table.below]
x = 1
[a.b.c]
[a]
y = 2

[[stage]]
name = "head"
lr = { low = 1e-5, high = 1 }
[stage.augment]
flip = "none"

[[stage]]
name = "all"
lr = [
  0.1,
  0.2,
]
[[stage.part]]
x = 1
[[stage.part]]
x = 2
[stage.part.deep]
z = inf
'''.replace("\\'", "'")


def paths(values, here=()):
    items = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in items:
        yield (*here, key)
        if isinstance(value, dict | list):
            yield from paths(value, (*here, key))


@pytest.mark.parametrize(
    "text",
    [ODD, ODD.replace("\n", "\r\n"), "", "# nothing", "x=1", "x = {}\ny = []", "[a]\n[[b]]\n[[b]]"]
    + [path.read_text() for path in sorted(Path("training/recipes").glob("*.toml"))],
)
def test_paths_equal_those_of_tomllib(text):
    assert set(lines_of(text)) == set(paths(tomllib.loads(text)))


def test_each_key_is_on_its_line():
    lines = ODD.splitlines()
    found = lines_of(ODD)
    for path, line in found.items():
        if isinstance(path[-1], str):
            assert path[-1] in lines[line - 1], (path, line)
    stages = [i for i, text in enumerate(lines, start=1) if text == "[[stage]]"]
    assert [found["stage", 0], found["stage", 1]] == stages
    assert found["stage", 1, "lr", 1] == lines.index("  0.2,") + 1
    assert found["stage", 0, "lr", "high"] == found["stage", 0, "lr"] == stages[0] + 2
    assert found["stage", 1, "part", 1, "deep", "z"] == len(lines)
    assert found["many", 1, 1] == lines.index("  [2, 3],") + 1
    assert found["inline", "b", "c", 1, "e"] == found["inline",]
    assert found["table",] == found["table", "below"] - 1


def test_windows_line_ends_do_not_change_the_lines():
    assert lines_of(ODD.replace("\n", "\r\n")) == lines_of(ODD)
