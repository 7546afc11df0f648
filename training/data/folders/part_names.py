"""Names that folders of the parts of a data set have: for training, validation and test."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Mapping
from typing import Final

_NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "train": (
        *("train", "training", "tr", "trn", "trainset", "trainingset", "traindata", "trainval"),
        *("trainingsdaten", "entrainement", "entraînement", "apprentissage", "entrenamiento"),
        *("addestramento", "treino", "treinamento", "训练", "训练集", "訓練"),
    ),
    "valid": (
        *("valid", "val", "va", "validation", "validate", "validset", "valset", "validationset"),
        *("dev", "devset", "eval", "evaluation", "evalset", "validierung", "validierungsdaten"),
        *("validación", "validacion", "validação", "validacao", "convalida", "验证", "验证集"),
        "検証",
    ),
    "test": (
        *("test", "testing", "te", "ts", "tst", "testset", "testingset", "testdata"),
        *("holdout", "heldout", "pred", "unlabeled", "unlabelled", "testdaten", "prueba"),
        *("pruebas", "teste", "测试", "测试集", "テスト"),
    ),
}
"""Part -> words that name it, in lower case."""

_PARTS: Final = {word: part for part, words in _NAMES.items() for word in words}

_UNCLEAR: Final = frozenset(["te", "ts", "pred"])
"""Words for the test part that are names of classes as well: a language's code, an abbreviation."""

# fmt: off
_FILLERS: Final = frozenset([
    "set", "data", "dataset", "images", "image", "imgs", "img", "photos", "photo", "pictures",
    "pics", "folder", "split", "part", "files", "seg", "jpg", "jpeg", "png", "resized", "cropped",
    "full", "final",
])
# fmt: on
"""Words that a name may have beside the part: `train_images`, `seg_test`, `Validation Set`."""

# fmt: off
_CONTAINERS: Final = frozenset([
    "images", "image", "imgs", "img", "photos", "photo", "pictures", "pics", "jpegimages", "data",
    "dataset", "jpg", "jpeg", "png",
])
# fmt: on

_WORD: Final = re.compile(r"[^\W\d_]+")
_CAMEL: Final = re.compile(r"(?<=[a-z])(?=[A-Z])")
_SHORTEST: Final = 7
"""Letters of the shortest name that is compared with others letter by letter."""
_CLOSE: Final = 0.9


def part_of(name: str) -> str:
    """Return the part that a folder's name stands for: "train", "valid", "test", or "".

    Case, digits and words such as "images" and "set" are ignored: `Train`, `test1`, `train2017`,
    `validation_images`.
    """
    return _PARTS.get(_key(name), "")


def is_clear_part(name: str) -> bool:
    """Check whether a folder's name is that of a part and hardly one of a class: not `te`."""
    return _key(name) in _PARTS.keys() - _UNCLEAR


def meant_part(name: str) -> str:
    """Return the name of a part that a folder's name is with a slip of the pen, or "".

    It is the word that is nearest: `validation` for `validaton`, `train` for `trian`.
    """
    key = _key(name)
    return "" if key in _PARTS or not resembles_part(name) else _nearest(key)


def resembles_part(name: str) -> str:
    """Return the part whose name a folder's name is, or is with a slip of the pen; or "".

    A slip is two letters in the other order (`trian`) or, in a long name, a letter more, less or
    another one (`validaton`). Short names are not compared further: `rain` and `brain` are classes.
    """
    key = _key(name)
    return _PARTS.get(key if key in _PARTS else _nearest(key), "")


def _nearest(key: str) -> str:
    """Return the word that a key is with a slip of the pen; "" if there is none."""
    if len(key) < 4:
        return ""
    for word in _PARTS:
        if key[0] == word[0] and sorted(key) == sorted(word):
            return word
    if len(key) < _SHORTEST:
        return ""
    near = difflib.get_close_matches(key, _PARTS, n=1, cutoff=_CLOSE)
    return near[0] if near and near[0][0] == key[0] else ""


def mentions_part(name: str) -> str:
    """Return the part that a word in a folder's name stands for, or "": `fold1_train`."""
    words = map(str.casefold, _WORD.findall(_CAMEL.sub(" ", name)))
    return next((_PARTS[word] for word in words if len(word) > 2 and word in _PARTS), "")


def is_container(name: str) -> bool:
    """Check whether a folder's name says only that photos are in it: `images`, `JPEGImages`."""
    return name.casefold() in _CONTAINERS


def _key(name: str) -> str:
    words = _WORD.findall(_CAMEL.sub(" ", unicodedata.normalize("NFC", name)))
    return "".join(word for word in map(str.casefold, words) if word not in _FILLERS)
