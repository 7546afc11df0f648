"""Escape text from others before it is shown on a terminal or in a log.

Names of models, labels and files can contain escape sequences, with which a terminal changes its
title, hides text or moves the cursor.
"""

from __future__ import annotations

import re
from typing import Final

# Control characters, line and paragraph separators, characters that change the direction of the
# text after them, and lone surrogates, which can't be encoded.
_CONTROL: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def escape(text: object) -> str:
    r"""Return `str(text)` as one line, with `\x1b` and the like in place of control characters."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], str(text))


def escape_lines(text: object) -> str:
    """Return text like `escape`, but keep its line breaks."""
    return "\n".join(map(escape, str(text).split("\n")))
