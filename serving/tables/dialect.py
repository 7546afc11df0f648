"""Recognise how a text table is written, from its first 64 KiB: encoding, delimiter, column names.

encoding      by the byte-order mark: UTF-8, UTF-16 or UTF-32; without one UTF-8, or UTF-16 where
              every second byte is zero
delimiter     comma, semicolon, tab or vertical bar; in a .txt file also spaces. Only what
              separates the first record is considered, and then how evenly it separates the
              next ones. A line `sep=;`, as spreadsheets write it, decides.
spaces        whether spaces after the delimiter are part of the values
"""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from serving.errors import DataError
from serving.tables.columns import has_image_suffix
from serving.terminal import quote_path

HEAD: Final = 2**16
"""Number of bytes from which a table is recognised."""

LONGEST_FIELD: Final = 2**27
"""Largest number of characters of a CSV field or line; columns other than the paths may be long."""

_RECORDS: Final = 20
_MARKS: Final = (  # UTF-32 first: its mark begins with that of UTF-16
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_DELIMITERS: Final = (",", ";", "\t", "|")
_FOREIGN: Final = (
    (b"PK\x03\x04", "a spreadsheet or zip archive; save the sheet as 'CSV UTF-8'"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a spreadsheet; save the sheet as 'CSV UTF-8'"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file; get it: git lfs pull"),
    (b"<!doctype html", "a web page, not a table; download the file itself"),
    (b"<html", "a web page, not a table; download the file itself"),
    (b"{\\rtf", "a text document; save the table as 'CSV UTF-8'"),
    (b"%pdf-", "a PDF document; save the table as 'CSV UTF-8'"),
    (b"\x1f\x8b", "compressed with gzip; unpack it"),
    (b"[{", "a JSON array; write an object a line: jq -c '.[]' FILE > FILE.jsonl"),
)


@dataclass(frozen=True)
class Dialect:
    """How a text table is written.

    Attributes:
        encoding: Name of the codec, which removes a byte-order mark.
        delimiter: Character between the fields.
        skip_spaces: Whether spaces after a delimiter are no part of the field.
        skip_lines: Number of lines before the table: `sep=;`, or comments.
    """

    encoding: str
    delimiter: str = ","
    skip_spaces: bool = False
    skip_lines: int = 0

    def records(self, lines: Iterator[str]) -> Iterator[list[str]]:
        """Parse lines (after the skipped ones) to records; raises csv.Error for unclosed quotes."""
        csv.field_size_limit(LONGEST_FIELD)
        return csv.reader(
            lines, delimiter=self.delimiter, skipinitialspace=self.skip_spaces, strict=True
        )


def find_encoding(head: bytes) -> str:
    """Return the encoding of a text by its first bytes; "" if the bytes are no text."""
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    if b"\0" not in head:
        return "utf-8"
    start = head[: 2 * (min(len(head), 4096) // 2)]
    zeros = [start[place::2].count(0) / max(len(start) // 2, 1) for place in (0, 1)]
    if max(zeros) > 0.4 and min(zeros) < 0.05:
        return "utf-16-le" if zeros[1] > zeros[0] else "utf-16-be"
    return "" if head.count(0) > len(head) // 4 else "utf-8"  # a path in a table may have a NUL


def check_kind(path: str, head: bytes) -> None:
    """Check by its first bytes that a file is no spreadsheet, web page or the like.

    Raises:
        DataError: It is one.
    """
    start = head.lstrip()[:64].lower()
    start = start if not start.startswith(b"[") else b"".join(start.split())
    for mark, what in _FOREIGN:
        if start.startswith(mark.lower()):
            name = quote_path(path)
            raise DataError(f"{path}: it is {what.replace('FILE', name)}")


def check_text(path: str, head: bytes) -> str:
    """Return the encoding of a text file by its first bytes.

    Raises:
        DataError: The file is something else, such as a spreadsheet or a web page.
    """
    check_kind(path, head)
    encoding = find_encoding(head)
    if not encoding:
        raise DataError(f"{path}: it is mostly NUL bytes, so it is no text; save it as 'CSV UTF-8'")
    return encoding


def find_dialect(path: str, head: bytes) -> Dialect:
    """Return how a text table is written.

    Args:
        path: Path of the table. The suffix decides between a tab and a comma that are equally
            likely, and .txt allows spaces.
        head: The first `HEAD` bytes.

    Raises:
        DataError: The file is no text.
    """
    encoding = check_text(path, head)
    try:
        text = codecs.getincrementaldecoder(encoding)("surrogateescape").decode(head)
    except UnicodeError as error:
        raise DataError(f"{path}: can't be read: {error}") from error
    if len(head) >= HEAD:  # the last line may be cut
        text = text[: max(text.rfind("\n"), text.rfind("\r")) + 1] or text
    lines = io.StringIO(text, newline="").readlines()
    first = lines[0].strip().lower() if lines else ""
    if first.startswith("sep=") and len(first) <= 5:
        delimiter = lines[0].strip()[4:] or "\t"  # `strip` removes a tab
        return Dialect(encoding, delimiter, _spaced(lines[1:], delimiter), 1)
    comments = _count_comments(lines)
    lines = lines[comments:]
    order = sorted(_DELIMITERS, key=lambda d: d != "\t") if path.endswith(".tsv") else _DELIMITERS
    delimiter = _best(lines, order)
    if not delimiter and path.lower().endswith(".txt"):
        delimiter = _best(lines, (" ",))
        return Dialect(encoding, delimiter or ",", bool(delimiter), comments)
    return Dialect(encoding, delimiter or ",", _spaced(lines, delimiter or ","), comments)


def _count_comments(lines: Sequence[str]) -> int:
    """Return the number of first lines that begin with # and have no delimiter, as others have."""
    count = 0
    while count < len(lines) and _may_be_comment(lines[count]):
        count += 1
    return count if count < len(lines) and _is_split(lines[count]) else 0


def _may_be_comment(line: str) -> bool:
    return line.startswith("#") and not _is_split(line) and not has_image_suffix(line)


def _is_split(line: str) -> bool:
    return any(delimiter in line for delimiter in _DELIMITERS)


def _best(lines: Sequence[str], delimiters: Sequence[str]) -> str:
    """Return the delimiter that separates the first records most evenly; "" if none does."""
    best, most = "", 0.0
    for delimiter in delimiters:
        counts = [len(record) for record in _sample(lines, delimiter)]
        if counts and counts[0] > 1:
            share = counts.count(counts[0]) / len(counts)
            if share > most:
                best, most = delimiter, share
    return best


def _spaced(lines: Sequence[str], delimiter: str) -> bool:
    """Return whether every delimiter of the first record has a space after it."""
    first = next(iter(_sample(lines, delimiter)), [])
    return len(first) > 1 and all(field.startswith(" ") for field in first[1:])


def _sample(lines: Sequence[str], delimiter: str) -> list[list[str]]:
    csv.field_size_limit(LONGEST_FIELD)
    found: list[list[str]] = []
    try:
        for record in csv.reader(lines, delimiter=delimiter, skipinitialspace=delimiter == " "):
            if any(field.strip() for field in record):
                found.append(record)
            if len(found) == _RECORDS:
                break
    except csv.Error:
        pass  # told when the table is read
    return found
