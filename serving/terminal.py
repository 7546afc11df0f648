"""Escape text from others before it is shown on a terminal or in a log.

Names of models, labels and files can contain escape sequences, with which a terminal changes its
title, hides text or moves the cursor.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from typing import Final, TextIO

# Control characters, line and paragraph separators, characters that change the direction of the
# text after them, and lone surrogates, which can't be encoded.
_CONTROL: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escape(text: object) -> str:
    r"""Return `str(text)` as one line, with `\x1b` and the like in place of control characters."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], str(text))


def escape_json(text: str) -> str:
    """Escape control characters in a JSON text, which has the same value afterwards."""
    return _CONTROL.sub(lambda found: _json_escape(found[0]), text)


def quote(word: str) -> str:
    r"""Return a text as one word of a shell command, which can be shown, copied and pasted.

    Characters that `escape` or the encoding of the output would change are written as bash, zsh and
    ksh read them: `$'\012'`.
    """
    if not _CONTROL.search(word) and _can_be_shown(word, sys.stdout, sys.stderr):
        return shlex.quote(word)
    codes = (
        chr(code) if 32 <= code < 127 and chr(code) not in "\\'" else f"\\{code:03o}"
        for code in word.encode("utf-8", "surrogateescape")
    )
    return f"$'{''.join(codes)}'"


def quote_path(path: str | os.PathLike[str]) -> str:
    """Return a path as `quote` does; one that begins with a dash is not taken for an option."""
    text = os.fspath(path)
    return quote(f"./{text}" if text.startswith("-") else text)


def valid_utf8(path: object) -> str:
    r"""Return a path as a text that can be encoded: `\xff` in place of bytes that are not UTF-8."""
    return str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _can_be_shown(text: str, *streams: TextIO | None) -> bool:
    try:
        for stream in streams:
            text.encode(getattr(stream, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def show(text: object = "", stream: TextIO | None = None, *, flush: bool = False) -> None:
    """Print one line, with control characters escaped.

    Args:
        text: The line.
        stream: Where to print; None: standard output.
        flush: As for `print`.
    """
    print(escape(text), file=stream or sys.stdout, flush=flush)


def show_lines(text: str) -> None:
    """Print several lines, with other control characters escaped."""
    for line in text.split("\n"):
        show(line)


def show_json(text: str) -> None:
    """Print a JSON text that ends with a line break, with control characters escaped.

    So are all characters beyond ASCII if the encoding of standard output lacks one of them.
    """
    text = escape_json(text)
    if not _can_be_shown(text, sys.stdout):
        text = re.sub("[^\x00-\x7f]", lambda found: json.dumps(found[0])[1:-1], text)
    print(text, end="")


def _json_escape(character: str) -> str:
    return character if character == "\n" else f"\\u{ord(character):04x}"
