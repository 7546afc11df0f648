"""Names of ImageNet's classes, whose folders have the numbers of synsets: n01440764 is a tench."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Final, NamedTuple

from serving.utils.regular_files import read_limited
from training.data.folders.photo_tree import PhotoFolder

_SYNSET: Final = re.compile(r"n[0-9]{8}")
_FILES: Final = ("LOC_synset_mapping.txt", "synset_words.txt", "words.txt")
_LINE: Final = re.compile(r"(n[0-9]{8})[\t ]+(.*\S)")
_MAX_BYTES: Final = 2**24  # words.txt of all of ImageNet has 2.6 MB


class SynsetNames(NamedTuple):
    """Names of classes: synset -> name; and the file that they come from."""

    names: Mapping[str, str]
    file: str


def names_of_synsets(root: Path, base: PhotoFolder, labels: Set[str]) -> SynsetNames | None:
    """Return the names of classes that are synsets of WordNet.

    A name is the first word of the synset. Where several classes have the same first word, as the
    crane and the crane, all words of the synset are the name, or the word and the synset.

    Args:
        root: The data folder.
        base: The folder in it in which the classes or parts begin.
        labels: Names of the class folders.

    Returns:
        None if not all labels are synsets, or if no file in `root` and `base` names all of them.
    """
    if not labels or not all(map(_SYNSET.fullmatch, labels)):
        return None
    for folder in dict.fromkeys((root, root / base.path)):
        for name in _FILES:
            words = _read(folder / name, labels)
            if labels <= words.keys():
                return SynsetNames(_unique(words), name)
    return None


def _read(path: Path, labels: Set[str]) -> dict[str, str]:
    try:
        text = read_limited(path, _MAX_BYTES).decode("utf-8", "replace")
    except OSError:
        return {}
    lines = map(_LINE.fullmatch, text.splitlines())
    return {line[1]: line[2] for line in lines if line and line[1] in labels}


def _unique(words: Mapping[str, str]) -> dict[str, str]:
    names = {synset: text.partition(",")[0].strip() for synset, text in words.items()}
    for form in ("{words}", "{words} ({synset})"):
        counts = Counter(names.values())
        names = {
            synset: name if counts[name] == 1 else form.format(words=words[synset], synset=synset)
            for synset, name in names.items()
        }
    return names
