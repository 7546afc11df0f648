"""Find the names of the images to score, and load the bytes of an image by its name.

    Input                          Module     Images
    folder or glob pattern         folders    all images, in natural order
    list or standard input         lists      one for every line or table row, in order
    tar or zip archive             archives   all images in the archive, as ARCHIVE::MEMBER
    address such as s3://bucket    remote     images of the file, folder or pattern
    other file                     -          the file itself, whatever its suffix

The name of an image is the value of the column `path` in the table of scores: a path, an address or
ARCHIVE::MEMBER. Any process can load the image from the name alone. A line of a list also
has one of these three forms.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Final

from serving.errors import BrokenImage, DataError, OptionError, RequestError
from serving.imaging.formats import SUFFIXES
from serving.inputs import archives, file_kinds, folders, lists, open_archives, remote
from serving.inputs.folders import Note
from serving.inputs.local_files import check_inside, read_file
from serving.inputs.passed_over import OnPassedOver, PassedOver
from serving.inputs.path_kind import similar
from serving.tables.reader import TABLES

STDIN: Final = "-"
"""The input that stands for standard input."""

Stream = IO[bytes] | IO[str]

_SUFFIXES: Final = f"; looked for files ending in {', '.join(sorted(SUFFIXES))}"


@dataclass(frozen=True)
class InputSource:
    """One input, such as a folder, a list or an archive.

    Attributes:
        names: Function that yields the names of the input's images. Takes a function `note`, which
            is called with a message about anything that can't be read.
        if_empty: Error message for an input without images.
    """

    names: Callable[[Note], Iterator[str]]
    if_empty: str


def find(
    inputs: Sequence[str],
    *,
    column: str | None = None,
    stdin: Stream | None = None,
    note: Note = lambda line: None,
    passed_over: PassedOver | None = None,
) -> Iterator[str]:
    """Find the images of `inputs` and yield their names, in the order of the inputs.

    An input that exists under exactly that name is a folder, a list (by its suffix), an archive (by
    its suffix) or an image. Otherwise `{000..012}` and `{a,b}` are expanded, `*`, `?`, `[` and
    `**` are wildcards, and `ARCHIVE::MEMBER` is a member of an archive. An input that is given
    twice yields its images twice.

    Args:
        inputs: Paths, patterns and addresses, as on the command line; "-" is standard input.
        column: Name of the column that has the paths, for lists with columns.
        stdin: Stream that is read instead of standard input.
        note: Called once with each message about something that is skipped: a folder that can't be
            read, table rows without a path, the rest of a corrupt archive, an input without images.
        passed_over: Counts what is passed over in folders and archives, until the last name.

    Raises:
        DataError: An input does not exist or can't be listed, a list lacks the column, or no input
            has any image. Raised by the call itself, before the first name is requested.
        OptionError: `column` is given, but no input is a list with columns.
    """
    passed_over = PassedOver() if passed_over is None else passed_over
    sources = [source for word in inputs for source in _sources(word, column, stdin, passed_over)]
    words = (expanded for word in inputs for expanded in folders.expand_braces(word))
    if column is not None and not any(map(lists.is_table, words)):
        kinds = ", ".join(TABLES)
        raise OptionError(f"--column {column}: no input is a list with columns ({kinds})")
    names = _names(sources, _UniqueNotes(note), passed_over)
    return chain([next(names)], names)  # `next` here raises the error before any other work


def protocols(inputs: Sequence[str], also: str = "") -> list[str]:
    """Return the protocols of the addresses among `inputs` and those listed in `also`, sorted.

    Args:
        inputs: Paths and addresses.
        also: More protocols, separated by commas: "s3,https".
    """
    named = {remote.protocol(word) for word in inputs if not os.path.exists(word)}
    return sorted((named | {kind.strip().lower() for kind in also.split(",")}) - {""})


class Reader:
    """Loads the bytes of images. Thread-safe.

    All readers of a process share the same open archives. A member of a zip or an uncompressed tar
    is read directly at its offset. A compressed tar is read sequentially: it is decompressed once
    if the members are requested in order, and once for each member if they are requested in reverse
    order.
    """

    def __init__(
        self, protocols: Collection[str] = (), root: str | os.PathLike[str] | None = None
    ) -> None:
        """Set what may be read.

        Args:
            protocols: Allowed protocols of addresses, such as "s3". Local files are always allowed.
            root: Folder that must contain all local files, links followed. None: no limit.
        """
        self._protocols = {*protocols, "file", "local"}
        self._root = None if root is None else os.path.realpath(root)
        self._archives: open_archives.OpenArchives | None = None

    def load(self, name: str) -> bytes:
        """Return the bytes of one image.

        Args:
            name: Path, address or ARCHIVE::MEMBER.

        Raises:
            BrokenImage: The image can't be read, the protocol of its address is not allowed, or it
                lies outside of the root folder.
            TooLarge: The image has more than `MAX_FILE` bytes.
        """
        return self.read(name)[0]

    def read(self, name: str) -> tuple[bytes, int | None]:
        """Return the bytes of one image, and the permissions of its file; see `load`.

        The permissions of a member of an archive are those of the archive, without the right to
        execute. At an address that is no local file, they are None.
        """
        if remote.is_address(name) and not os.path.exists(name):
            kind = remote.protocol(name)
            if kind not in self._protocols:
                raise BrokenImage(f"an address in a list: to read those, give --addresses {kind}")
            found = remote.load(name)
            return (found, None) if isinstance(found, bytes) else read_file(str(found), self._root)
        member = archives.split(name)
        if member is None:
            return read_file(name, self._root)
        check_inside(member[0], self._root)
        if self._archives is None:
            self._archives = open_archives.process_archives()
        data = self._archives.load(*member)
        return data, _permissions(member[0])

    def close(self) -> None:
        """Release the shared archives. They are closed when all readers have released them."""
        self._archives = None


def _permissions(archive: str) -> int | None:
    try:
        return os.stat(archive).st_mode & 0o666
    except OSError:  # it was removed meanwhile
        return 0o600


def _sources(
    word: str, column: str | None, stdin: Stream | None, passed_over: OnPassedOver
) -> Iterator[InputSource]:
    if word == STDIN:
        yield InputSource(partial(_read_stdin, stdin), f"{word}: no paths came; write one a line")
    elif os.path.exists(word):
        yield _existing(word, column, passed_over)
    elif remote.is_address(word):
        yield from (_remote(one, passed_over) for one in folders.expand_braces(word))
    elif next(folders.expand_braces(word)) != word:
        for expanded in folders.expand_braces(word):
            yield from _sources(expanded, column, stdin, passed_over)
    elif folders.is_pattern(word):
        names = partial(_matching, word, column, passed_over)
        yield InputSource(names, f"{word}: matches no images{_SUFFIXES}")
    elif archives.split(word):
        yield InputSource(partial(_itself, word), "")
    else:
        near = similar(Path(word), "photos")
        hint = f"did you mean {near}? Else give" if near else "give"
        raise DataError(
            f"{word}: not there; {hint} folders, images, zip and tar archives, lists in "
            f"{', '.join((lists.LINES, *TABLES))}, or - for paths from standard input"
        )


def _existing(word: str, column: str | None, passed_over: OnPassedOver) -> InputSource:
    if os.path.isdir(word):
        names = partial(folders.images_below, word, passed_over=passed_over)
        return InputSource(names, f"{word}: no images found{_SUFFIXES}")
    if word.lower().endswith(lists.LINES):
        if_empty = f"{word}: lists no images; write one path a line"
        return InputSource(partial(lists.read_lines, word), if_empty)
    if not os.path.isfile(word):
        # A named pipe or device: opening it could block.
        return InputSource(partial(_itself, word), "")
    if lists.is_table(word):
        table, at = lists.open_list(word, column)
        if_empty = f"{word}: lists no images in {table.columns[at]}"
        return InputSource(partial(lists.read_column, table, at), if_empty)
    archives.check_kind(word)
    if archives.is_archive(word):
        try:
            archives.check(word)
        except DataError as error:
            raise DataError(f"{word}: {error}") from error
        except OSError:
            pass  # the error is noted when the members are listed
        names = partial(archives.names, word, passed_over=passed_over)
        return InputSource(names, f"{word}: no images in it{_SUFFIXES}")
    return InputSource(partial(_itself, word), "")


def _itself(word: str, note: Note) -> Iterator[str]:
    return iter([word])


def _remote(address: str, passed_over: OnPassedOver) -> InputSource:
    found = remote.find(address, passed_over)
    return InputSource(found, f"{address}: no images found{_SUFFIXES}")


def _matching(
    pattern: str, column: str | None, passed_over: OnPassedOver, note: Note
) -> Iterator[str]:
    """Yield the images that match `pattern`.

    For an archive or a list that matches, the images in it are yielded.
    """
    for path in folders.images_matching(pattern, note, passed_over):
        if file_kinds.is_image(path):
            yield path
            continue
        try:
            source = _existing(path, column, passed_over)
        except RequestError as error:
            note(str(error))
        else:
            yield from source.names(note)


def _read_stdin(stdin: Stream | None, note: Note) -> Iterator[str]:
    stream = sys.stdin if stdin is None else stdin
    if stream is None:  # a process may have no standard input
        return
    try:
        yield from lists.read_stream(stream)
    except (OSError, ValueError) as error:  # ValueError: the stream is closed
        note(f"{STDIN}: standard input can't be read: {error}")


def _names(
    sources: Sequence[InputSource], note: _UniqueNotes, passed_over: PassedOver
) -> Iterator[str]:
    empty: list[str] = []
    found = False
    for source in sources:
        names = source.names(note)
        first = next(names, None)
        if first is None:
            empty.append(source.if_empty)
            continue
        found = True
        yield first
        yield from names
    if not found:
        several = f"nothing in any of {len(sources)} inputs; " if len(sources) > 1 else ""
        reason = f" ({note.first})" if note.first else ""
        counts = f"; {passed_over.line()}" if passed_over else ""
        raise DataError(f"{several}{empty[0] if empty else 'no input given'}{reason}{counts}")
    for line in empty:
        note(line)


class _UniqueNotes:
    """Wrapper of a `note` function that passes on each distinct message once.

    Invalid UTF-8 bytes in a message are escaped.

    Attributes:
        first: The first message; "" if there is none yet.
    """

    def __init__(self, note: Note) -> None:
        self._note, self._lines = note, set[str]()
        self.first = ""

    def __call__(self, line: str) -> None:
        if line not in self._lines:
            self._lines.add(line)
            line = line.encode("utf-8", "backslashreplace").decode()
            self.first = self.first or line
            self._note(line)
