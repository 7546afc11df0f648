"""What is to be scored: names that are found one after the other, and the bytes behind a name.

    folders, patterns  inputs_search   every image, natural order
    lists, pipes       lists           every line, in its order
    tar archives       archives        every image in them, as ARCHIVE::MEMBER
    addresses          inputs_remote   as folders, patterns and files, through fsspec
    a file             -               an image, whatever it is called

A name is what the table's column `path` shows. It is enough to read the bytes again at any time,
in any process, and can stand in a list or be an input itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import IO, Final

from serving.errors import BrokenImage, DataError, OptionError, RequestError, TooLarge
from serving.imaging import decode as images
from serving.inputs import folders as inputs_search
from serving.inputs import lists, remote, tar, tar_members
from serving.inputs.compression import MAX_FILE as _MAX_FILE
from serving.inputs.folders import Note

PIPE: Final = "-"
"""Standard input."""

Stream = IO[bytes] | IO[str]

_LOOKED: Final = f"; looked for files ending in {', '.join(sorted(images.SUFFIXES))}"


@dataclass(frozen=True)
class InputSource:
    """One of the inputs asked for.

    names: what is found there; takes a place to tell what can't be looked into.
    nothing: what is said when that is nothing.
    """

    names: Callable[[Note], Iterator[str]]
    nothing: str


def find(
    inputs: Sequence[str],
    *,
    column: str | None = None,
    stdin: Stream | None = None,
    note: Note = lambda line: None,
) -> Iterator[str]:
    """Find what `inputs` name, in the order given; nothing is held but the names of one folder.

    An input that is there by its very name is that: a folder, a list by its suffix, a tar archive
    by its suffix, else an image. Otherwise `{000..012}` is written out, `*`, `?`, `[` and `**`
    match, and `ARCHIVE::MEMBER` is a member. What is named twice comes twice.

    Args:
        inputs: As on the command line; "-" is standard input.
        column: Of the lists that have columns.
        stdin: In place of standard input.
        note: Takes a line about each thing that is no input: a folder that can't be searched, rows
            without a path, the rest of a broken archive, an input in which nothing is. The same
            line comes once. None of it stops what else there is.

    Raises:
        DataError: An input that is not there, a list without such a column; nothing at all is
            found. All of it before the first name is given.
        OptionError: A column, and no list that has any.
    """
    sources = [source for word in inputs for source in _sources(word, column, stdin)]
    words = (one for word in inputs for one in inputs_search.braces(word))
    if column is not None and not any(map(lists.is_table, words)):
        kinds = ", ".join(lists.TABLES)
        raise OptionError(f"--column {column}: no input is a list with columns ({kinds})")
    found = _names(sources, _Once(note))
    return chain([next(found)], found)  # so that what is wrong is known before any work


def protocols(inputs: Sequence[str], also: str = "") -> list[str]:
    """Of the addresses that are asked for by name, and others, as in "s3,https"."""
    named = {remote.protocol(word) for word in inputs if not os.path.exists(word)}
    return sorted((named | {kind.strip().lower() for kind in also.split(",")}) - {""})


class Reader:
    """Reads the bytes behind names. Safe among threads, and those of a process share archives.

    A member of a plain tar costs one look at its header, wherever it is. A compressed tar is read
    on: in order it is unpacked once, backwards it is begun anew for each member.
    """

    def __init__(self, protocols: Collection[str] = ()) -> None:
        """`protocols`: those that addresses may have; files here always."""
        self._protocols = {*protocols, "file", "local"}
        self._archives: tar_members.Archives | None = None

    def load(self, name: str) -> bytes:
        """The bytes of one input.

        Raises:
            BrokenImage: It can't be read.
            TooLarge: No photo is that big.
        """
        if remote.is_address(name) and not os.path.exists(name):
            kind = remote.protocol(name)
            if kind not in self._protocols:
                raise BrokenImage(f"an address in a list: to read those, give --addresses {kind}")
            return remote.load(name, load)
        place = tar.split(name)
        if place is None:
            return load(name)
        if self._archives is None:
            self._archives = tar_members.shared()
        return self._archives.load(*place)

    def close(self) -> None:
        """Let the archives go; the last Reader of a process closes them."""
        self._archives = None


def load(path: str) -> bytes:
    """The bytes of a file; as `Reader.load`."""
    try:
        # Opening a pipe would wait for ever.
        if not os.path.isfile(path):
            os.stat(path)  # says what is wrong, where something is
            raise BrokenImage("not a file")
        size = os.path.getsize(path)
        if size > _MAX_FILE:
            raise TooLarge(f"{size} bytes are more than the {_MAX_FILE} allowed")
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise BrokenImage(f"can't be read: {error.strerror or error}") from error
    except ValueError as error:  # a NUL in a line of a list
        raise BrokenImage(f"not a path: {error}") from error


def _sources(word: str, column: str | None, stdin: Stream | None) -> Iterator[InputSource]:
    if word == PIPE:
        yield InputSource(partial(_piped, stdin), f"{word}: no paths came; write one a line")
    elif os.path.exists(word):
        yield _there(word, column)
    elif remote.is_address(word):
        yield from map(_remote, inputs_search.braces(word))
    elif next(inputs_search.braces(word)) != word:
        for one in inputs_search.braces(word):
            yield from _sources(one, column, stdin)
    elif inputs_search.is_pattern(word):
        yield InputSource(partial(_matching, word, column), f"{word}: matches no images{_LOOKED}")
    elif tar.split(word):
        yield InputSource(partial(_itself, word), "")
    else:
        raise DataError(
            f"{word}: not there; give folders, images, tar archives, lists in "
            f"{', '.join((lists.LINES, *lists.TABLES))}, or - for paths from standard input"
        )


def _there(word: str, column: str | None) -> InputSource:
    if os.path.isdir(word):
        return InputSource(partial(inputs_search.below, word), f"{word}: no images found{_LOOKED}")
    if word.lower().endswith(lists.LINES):
        nothing = f"{word}: lists no images; write one path a line"
        return InputSource(partial(lists.lines, word), nothing)
    if not os.path.isfile(word):
        return InputSource(partial(_itself, word), "")  # looking into a pipe would wait for ever
    if lists.is_table(word):
        chosen = lists.column_of(word, column)
        return InputSource(
            partial(lists.cells, word, chosen), f"{word}: lists no images in {chosen}"
        )
    if tar.is_archive(word):
        try:
            tar.is_stream(word)
        except DataError as error:
            raise DataError(f"{word}: {error}") from error
        except OSError:
            pass  # told when it is looked into
        return InputSource(partial(tar.names, word), f"{word}: no images in it{_LOOKED}")
    return InputSource(partial(_itself, word), "")


def _itself(word: str, note: Note) -> Iterator[str]:
    return iter([word])


def _remote(address: str) -> InputSource:
    return InputSource(remote.find(address), f"{address}: no images found{_LOOKED}")


def _matching(pattern: str, column: str | None, note: Note) -> Iterator[str]:
    """Files; and what is in the archives and lists that the pattern names by their suffix."""
    for path in inputs_search.matching(pattern, note):
        if inputs_search.is_image(path):
            yield path
            continue
        try:
            source = _there(path, column)
        except RequestError as error:
            note(str(error))
        else:
            yield from source.names(note)


def _piped(stdin: Stream | None, note: Note) -> Iterator[str]:
    stream = sys.stdin if stdin is None else stdin
    if stream is None:  # a process may have none
        return
    try:
        yield from lists.piped(stream)
    except (OSError, ValueError) as error:  # a ValueError where it is closed
        note(f"{PIPE}: standard input can't be read: {error}")


def _names(sources: Sequence[InputSource], note: _Once) -> Iterator[str]:
    empty: list[str] = []
    found = False
    for source in sources:
        names = source.names(note)
        first = next(names, None)
        if first is None:
            empty.append(source.nothing)
            continue
        found = True
        yield first
        yield from names
    if not found:
        several = f"nothing in any of {len(sources)} inputs; " if len(sources) > 1 else ""
        why = f" ({note.first})" if note.first else ""
        raise DataError(f"{several}{empty[0] if empty else 'no input given'}{why}")
    for line in empty:
        note(line)


class _Once:
    """Tells each line once, and in letters that every terminal has."""

    def __init__(self, note: Note) -> None:
        self._note, self._told = note, set[str]()
        self.first = ""

    def __call__(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            line = line.encode("utf-8", "backslashreplace").decode()
            self.first = self.first or line
            self._note(line)
