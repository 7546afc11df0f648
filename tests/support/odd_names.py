"""Hypothesis strategies of texts and file names, odd ones among them.

They draw code points by number: `hypothesis.strategies.text` first builds a table of all
characters, for 3 seconds in every process.
"""

from __future__ import annotations

import os

from hypothesis import strategies as st

_USUAL = "ab01 .-_"
_ODD = "/\\:;,\"'`<>&|*?[]{}%=+@#~$\0\1\t\n\r\x1b\x7f\x85\xa0é\u0301\u2028\u202e\ufeff日😀ß"
# Lone surrogates, which JSON can contain; the second is a byte that is not UTF-8, as `os.fsdecode`
# returns it.
_SURROGATES = "\ud800\udcff"


def texts(
    *, min_size: int = 0, max_size: int = 8, surrogates: bool = False
) -> st.SearchStrategy[str]:
    """Texts with usual, odd and any other characters."""
    characters = st.sampled_from(_USUAL) | st.sampled_from(_ODD) | st.integers(0, 0x10FFFF).map(chr)
    if surrogates:
        characters |= st.sampled_from(_SURROGATES)
    else:
        characters = characters.filter(lambda one: not "\ud800" <= one <= "\udfff")
    return st.lists(characters, min_size=min_size, max_size=max_size).map("".join)


def file_names(max_size: int = 8) -> st.SearchStrategy[str]:
    """File names: any bytes but NUL and the slash, also those that are not UTF-8."""
    usual = texts(min_size=1, max_size=max_size).map(os.fsencode)
    return (
        (usual | st.binary(min_size=1, max_size=max_size))
        .map(lambda name: name.replace(b"\0", b"").replace(b"/", b""))
        .filter(lambda name: name not in (b"", b".", b".."))
        .map(os.fsdecode)
    )
