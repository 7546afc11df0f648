"""Find the line number of every key and array element of a TOML file.

`tomllib` does not report positions. This scanner parses only as much of TOML as it needs to find
lines, and it requires text that `tomllib` has parsed without errors.
"""

from __future__ import annotations

import re
import tomllib
from typing import Final

Path = tuple[str | int, ...]
"""Keys of tables and indices of arrays, from the root: ("stage", 0, "lr")."""

_SKIP: Final = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_KEY: Final = re.compile(r"""[ \t]*("(?:[^"\\\n]|\\.)*"|'[^'\n]*'|[A-Za-z0-9_-]+)[ \t]*""")
_TEXT: Final = re.compile(
    r'''"""(?:[^\\]|\\.)*?"{3,5}|\'\'\'.*?'{3,5}|"(?:[^"\\\n]|\\.)*"|'[^'\n]*\'''', re.DOTALL
)
_BARE: Final = re.compile(r"[^,\]}#\n]*")


def lines_of(text: str) -> dict[Path, int]:
    """Return the line, counted from 1, of the first occurrence of each key and each array element.

    The keys of the dict are paths in the result of `tomllib.loads(text)`. The line of a table is
    that of its header or of its first key.
    """
    return _Scanner(text).scan()


class _Scanner:
    """Scanner that goes through the text once; `at` is the current position."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.lines: dict[Path, int] = {}
        self.lengths: dict[Path, int] = {}  # array of tables -> its length so far

    def scan(self) -> dict[Path, int]:
        here: Path = ()
        while self.skip():
            if self.text.startswith("[[", self.at):
                self.at += 2
                here = self.header(self.keys(), array=True)
                self.at += 2
            elif self.text[self.at] == "[":
                self.at += 1
                here = self.header(self.keys(), array=False)
                self.at += 1
            else:
                self.pair(here)
        return self.lines

    def skip(self) -> bool:
        """Skip blanks and comments, and return False at the end of the text."""
        self.take(_SKIP)
        return self.at < len(self.text)

    def take(self, pattern: re.Pattern[str]) -> re.Match[str]:
        found = pattern.match(self.text, self.at)
        if found is None:
            raise ValueError(f"no TOML at character {self.at}")
        self.at = found.end()
        return found

    def note(self, path: Path) -> None:
        self.lines.setdefault(path, self.text.count("\n", 0, self.at) + 1)

    def keys(self) -> list[str]:
        """Parse a dotted key."""
        keys = []
        while True:
            key = self.take(_KEY)[1]
            keys.append(tomllib.loads(f"v = {key}")["v"] if key[0] in "\"'" else key)
            if not self.text.startswith(".", self.at):
                return keys
            self.at += 1

    def header(self, keys: list[str], *, array: bool) -> Path:
        """Return the key path of the table that a header line opens.

        For an array of tables, `[[a]]`, the path also has the index of the element just opened.
        """
        path: Path = ()
        for depth, key in enumerate(keys, start=1):
            path = (*path, key)
            self.note(path)
            if array and depth == len(keys):
                self.lengths[path] = self.lengths.get(path, 0) + 1
            if path in self.lengths:
                path = (*path, self.lengths[path] - 1)
                self.note(path)
        return path

    def pair(self, here: Path) -> None:
        path = here
        for key in self.keys():
            path = (*path, key)
            self.note(path)
        self.at += 1  # the equals sign
        self.skip()
        self.value(path)

    def value(self, path: Path) -> None:
        opening = self.text[self.at]
        if opening in "[{":
            self.at += 1
            index = 0
            while self.skip() and self.text[self.at] not in "]}":
                if opening == "{":
                    self.pair(path)
                else:
                    self.note((*path, index))
                    self.value((*path, index))
                index += 1
                self.skip()
                if self.text[self.at] == ",":
                    self.at += 1
            self.at += 1
        else:
            self.take(_TEXT if opening in "\"'" else _BARE)
