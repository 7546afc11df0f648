"""Read the state dict in a file of weights. Code in the file is never run.

What is no file of weights is recognised by its content, and the message says what it is: a pointer
of Git LFS, a web page, a graph, a file that is cut short.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import pickle
import re
import tarfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from serving.terminal import quote_path
from serving.utils.files import utf8_path
from serving.utils.regular_files import open_regular
from training.utils import tensor_header
from training.utils.console import quoted

_AGAIN: Final = "fetch or copy it again"
_SAVE: Final = "where it was made, save `model.state_dict()` with torch.save"
_HEAD: Final = 4096  # bytes by which the kind of a file is recognised

_LFS: Final = b"version https://git-lfs.github.com/spec/"
_ZIP: Final = b"PK\x03\x04"
_LEGACY: Final = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""Start of a file of torch.save before torch 1.6: the pickle of a number."""

_KINDS: Final = (
    (
        rb"\s*<(!doctype|html|head|body|\?xml)",
        "is a web page, not the file behind it: download the file itself (its raw or download "
        "address), logged in where that is needed",
    ),
    (rb"[^\n]{0,200}/annex/objects/", "is a pointer of git-annex: get it with `git annex get`"),
    (
        rb"\x08[\x01-\x40][\x12\x1a\x22\x2a\x32\x3a\x42]",
        "is an ONNX graph, not a state dict; give the weights that it was exported from",
    ),
    (rb"\x89HDF\r\n", "is an HDF5 file, of Keras or TensorFlow; weights of PyTorch are needed"),
    (rb"....TFL3", "is a TensorFlow Lite graph; weights of PyTorch are needed"),
    (rb"GGUF", "is a GGUF file of a language model; weights of an image network are needed"),
    (rb"\x93NUMPY", f"is a single NumPy array, not a state dict; {_SAVE}"),
    (
        rb"\x1f\x8b|\xfd7zXZ|BZh|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!",
        "is compressed; unpack it and give the file of weights in it",
    ),
    (rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF....WEBP|%PDF", "is a picture or a document, not weights"),
    (rb"\s*[\[{]", "is JSON, not weights; give the .safetensors or .pth file beside it"),
)
"""Start of a file, and what is said of it."""

_SCALAR: Final = np.float64(0).__reduce__()[0]  # a function of one number

_GLOBALS: Final[list[Any]] = [
    # Training options and results that checkpoints have beside the weights. All hold data only.
    *(argparse.Namespace, np.dtype, *(type(np.dtype(kind)) for kind in "?efdbhilqBHILQ")),
    # Modules in which other versions of Python and NumPy have them.
    *((pathlib.PosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")),
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]

# Names of a state dict in a checkpoint, most usual first, and those of an average of the weights.
_USUAL: Final = (
    *("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network"),
    *("weights", "params"),
)
_AVERAGED: Final = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "ema_model", "ema"),
)
_DEPTH: Final = 3  # of the dicts in which a state dict is looked for


class NotWeights(Exception):
    """A file has no weights that can be used. The message follows the name of the file."""


def read(path: Path, entry: str = "") -> tuple[dict[str, Tensor], str]:
    """Read the state dict in a file, whatever the file's suffix.

    Args:
        path: A file that torch.save has written, or in the format of safetensors.
        entry: Name of the state dict, for a checkpoint that has several; "" for the usual one.

    Returns:
        The tensors by name, and a line that says what was left out; "" if nothing was.

    Raises:
        NotWeights: The file is empty, cut short, of another kind, contains code, or has no state
            dict of this name.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(_HEAD)
    except OSError as error:
        raise NotWeights(f"can't be read: {error.strerror or error}") from error
    if not head:
        raise NotWeights(f"is empty: {_AGAIN}")
    if int.from_bytes(head[:8], "little") < size and head[8:9] == b"{":
        return _read_safetensors(path), ""
    _check_kind(path, head, size)
    return _choose(_load(path, size, head.startswith(_ZIP)), entry)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        tensor_header.read_header(path)
        with utf8_path(path) as name:
            return load_file(name)
    except Exception as error:  # safetensors has its own exceptions
        reason = " ".join(str(error).split())
        raise NotWeights(f"is cut short or damaged ({reason:.200}): {_AGAIN}") from error


def _check_kind(path: Path, head: bytes, size: int) -> None:
    """Raise `NotWeights` for a file that torch.save has not written."""
    if head.startswith(_LFS):
        of = re.search(rb"\nsize (\d{1,15})\n", head)
        real = f" of {int(of[1]):,} bytes" if of else ""
        pull = f"git -C {quote_path(path.absolute().parent)} lfs pull"
        raise NotWeights(
            f"is a pointer of Git LFS, not the file{real} itself: fetch it with `{pull}`"
        )
    if head.startswith(_ZIP):
        _check_zip(path, size)
        return
    if head.startswith(_LEGACY):
        return
    for pattern, text in _KINDS:
        if re.match(pattern, head, re.IGNORECASE | re.DOTALL):
            raise NotWeights(text)
    if tarfile.is_tarfile(path):
        raise NotWeights("is a tar archive; unpack it and give the file of weights in it")
    if head.startswith(b"\x80"):
        raise NotWeights(
            "is not a state dict: it is a pickle that torch.save has not written, and may contain "
            f"code, which is not run; {_SAVE}"
        )
    text = head.decode("utf-8", "replace")
    if text.isprintable() or ("\0" not in text and "\ufffd" not in text[:-1]):
        line = text.strip().partition("\n")[0]
        raise NotWeights(f"is a text, not weights; it begins with {quoted(line)}")


def _check_zip(path: Path, size: int) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise NotWeights(
            f"is cut short: it has {size:,} bytes, and the end of the file is missing: {_AGAIN}"
        ) from error
    inner = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inner:
        raise NotWeights(
            f"is not a state dict but a TorchScript program, which is not run; {_SAVE}"
        )
    if "data.pkl" in inner:
        return
    if any(name.endswith(".npy") for name in names):
        raise NotWeights(f"is an archive of NumPy arrays, not a state dict; {_SAVE}")
    if any(name.endswith(".weights.h5") for name in names):
        raise NotWeights("is a model of Keras; weights of PyTorch are needed")
    found = ", ".join(quoted(name, 40) for name in names[:3])
    raise NotWeights(
        f"is a zip archive ({found or 'nothing'} in it); unpack it and give the file of weights"
    )


def _load(path: Path, size: int, is_zip: bool) -> Any:
    try:
        with (
            torch.serialization.safe_globals(_GLOBALS),
            warnings.catch_warnings(),
            open_regular(path) as file,
        ):
            warnings.simplefilter("ignore")  # torch warns, then raises an error
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many types of errors
        name = re.search(r"GLOBAL ([\w.]{1,100})", str(error))
        if name:
            raise NotWeights(
                f"is not a state dict: it contains code ({name[1]}), which is not run; {_SAVE}"
            ) from error
        if is_zip and isinstance(error, pickle.UnpicklingError):
            raise NotWeights(
                f"is not a state dict, or not in the form that torch.save usually has; {_SAVE}"
            ) from error
        raise NotWeights(
            f"is not a state dict: it is damaged or cut short at {size:,} bytes, or of another "
            f"kind: {_AGAIN}"
        ) from error


def _choose(value: Any, entry: str) -> tuple[dict[str, Tensor], str]:
    found = dict(_state_dicts(value, "", 0, set()))
    if not found:
        raise NotWeights("is not a state dict: it must map names to tensors")
    if entry and entry not in found:
        raise NotWeights(f"has no state dict {quoted(entry)}; it has {_list(found)}")
    if entry or len(found) == 1:
        return found[entry] if entry else next(iter(found.values())), ""
    last = {name.rpartition(".")[2]: name for name in reversed(found)}
    name = next((last[name] for name in (*_USUAL, *_AVERAGED) if name in last), None)
    if name is None:
        raise NotWeights(
            f"has several state dicts: {_list(found)}; choose one by its name, as in "
            f"FILE::{next(iter(found))}"
        )
    others = [other for other in found if other != name]
    return found[name], f"{quoted(name)} is taken, and {_list(others)} not; choose by FILE::NAME"


def _list(names: Any) -> str:
    shown = [quoted(name, 40) for name in names]
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")


def _state_dicts(
    value: Any, name: str, depth: int, seen: set[int]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield the names and the tensors of the state dicts in a checkpoint.

    A state dict may have numbers and texts beside the tensors, which are left out. Tensors beside a
    state dict, such as the state of a random generator, are none.
    """
    if not isinstance(value, Mapping) or id(value) in seen:
        return
    seen.add(id(value))
    if not all(isinstance(key, str) for key in value):
        return
    inner: list[tuple[str, dict[str, Tensor]]] = []
    if depth < _DEPTH:
        for key, one in value.items():
            inner += _state_dicts(one, f"{name}.{key}" if name else key, depth + 1, seen)
    tensors = {key: one for key, one in value.items() if isinstance(one, Tensor)}
    if inner:
        yield from inner
    elif tensors:
        yield name, tensors
