"""Recipes that would take minutes are refused in a line, in seconds."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from serving.errors import OptionError
from training.config import load

GOOD = 'name = "a"\narch = "squeezenet1_1"\n[[stage]]\nname = "head"\n'
HOSTILE = {
    "megabytes": GOOD + "#" + "a" * 2**20,
    "unknown options": GOOD + "\n".join(f"x{number} = 1" for number in range(5000)),
    "parts of a key": ".".join("a" * 30_000) + " = 1",
    "parts of quoted keys": ".".join(['"a"'] * 15_000) + " = 1",
    "parts of a table": "[" + ".".join("a" * 30_000) + "]",
    "deep arrays": "a = " + "[" * 30_000 + "]" * 30_000,
    "deep tables": "a = " + "{a=" * 15_000 + "1" + "}" * 15_000,
    "stages": GOOD + "[[stage]]\n" * 6000,
    "digits": GOOD + "seed = " + "9" * 60_000,
    "nan": GOOD + "lr = nan",
    "not UTF-8": "\udcff",
    "control characters": '"\\u001b[2J" = 1\n' + GOOD,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_recipe_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes(HOSTILE[name].encode("utf-8", "surrogateescape"))
    started = time.process_time()
    with pytest.raises(OptionError) as refused:
        load.read(path)
    assert time.process_time() - started < 4
    assert "\x1b" not in str(refused.value)
    assert str(refused.value).startswith(str(path))


def test_a_recipe_may_come_from_a_pipe(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=(GOOD.replace("\n", "\r\n"),))
    writer.start()
    assert load.read(path).name == "a"
    writer.join()
