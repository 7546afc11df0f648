"""Decide which files are images and which files and folders are passed over in every search.

A file is an image by its suffix or, if its suffix says nothing, by its first bytes. Folders that
systems and tools make, such as the thumbnails of a network storage, are recognised by name. Outputs
of Fledge are recognised by a mark in them: `run.json` of a run, `manifest.json` of a bundle,
`entry.json` of an entry of the cache, `.fledge.json` of copied images, and the text `Software` in a
PNG file.

The rules hold below the folder that is searched, never for that folder itself.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from serving.imaging import formats
from serving.imaging.formats import SUFFIXES
from serving.inputs.passed_over import Reason
from serving.utils import json_reader
from serving.utils.regular_files import open_regular, read_limited

MARK: Final = ".fledge.json"
"""Name of the file that marks a folder as an output of Fledge: JSON with the key `made_by`."""

SOFTWARE: Final = "Fledge"
"""Text `Software` of the PNG files that Fledge draws."""

_SYSTEM_FOLDERS: Final[Mapping[str, str]] = {
    # Network storage
    "@eadir": "Synology's thumbnails and indexes",
    "@tmp": "Synology's temporary files",
    "@sharesnap": "Synology's snapshots",
    "@recycle": "QNAP's recycle bin",
    "@recently-snapshot": "QNAP's snapshots",
    "@transcode": "QNAP's converted files",
    ".@__thumb": "QNAP's thumbnails",
    ".@upload_cache": "QNAP's uploads in progress",
    "#recycle": "Synology's recycle bin",
    "#snapshot": "Synology's snapshots",
    ".snapshot": "NetApp's snapshots",
    "~snapshot": "NetApp's snapshots",
    ".snapshots": "snapshots of Btrfs",
    ".zfs": "snapshots of ZFS",
    "network trash folder": "trash of Apple file sharing",
    "temporary items": "temporary files of Apple file sharing",
    ".appledouble": "metadata of Apple file sharing",
    ".stversions": "old versions of files that Syncthing has replaced",
    ".dropbox.cache": "Dropbox's deleted files",
    # Operating systems
    "$recycle.bin": "Windows' recycle bin",
    "system volume information": "Windows' restore points",
    ".spotlight-v100": "macOS's search index",
    ".fseventsd": "macOS's log of changes",
    ".documentrevisions-v100": "macOS's old versions of files",
    ".temporaryitems": "macOS's temporary files",
    "__macosx": "metadata in archives made by macOS",
    "lost+found": "files that a check of the disk has found",
    "lost.dir": "files that Android has found",
    ".thumbnails": "thumbnails of Linux and Android",
    ".xvpics": "thumbnails of xv and GIMP",
    "ipod photo cache": "iTunes' copies of photos",
    ".picasaoriginals": "Picasa's copies of edited photos",
    # Tools
    ".git": "version control",
    ".hg": "version control",
    ".svn": "version control",
    ".bzr": "version control",
    "_darcs": "version control",
    ".dvc": "version control of data",
    ".ipynb_checkpoints": "Jupyter's copies",
    "__pycache__": "compiled Python code",
    ".venv": "a Python environment",
    "site-packages": "Python packages",
    "node_modules": "JavaScript packages",
    ".idea": "settings of an IDE",
    ".vscode": "settings of an IDE",
    ".vs": "settings of an IDE",
    ".cache": "a cache",
}
"""Folders that systems and tools make, in lower case, and what each holds. None can reasonably be
the name of a class."""

_SYSTEM_PATTERNS: Final[Mapping[str, str]] = {
    ".trash*": "trash of Linux, macOS and Android: .Trash-1000, .Trashes",
    "found.[0-9][0-9][0-9]": "files that a check of a Windows disk has found",
    "*.lrdata": "Lightroom's previews",
}
"""Patterns of such names, in lower case."""

_EXACT_FOLDERS: Final[Mapping[str, str]] = {
    "CVS": "version control",
    "RECYCLER": "recycle bin of Windows XP",
}
"""Such names that other folders may have in another case."""

_SYSTEM_FILES: Final = frozenset(
    {"thumbs.db", "ehthumbs.db", "desktop.ini", ".ds_store", "picasa.ini", ".picasa.ini", MARK}
)
"""Files that systems and tools make, in lower case."""
_APPLE_DOUBLE: Final = "._"
"""Begins the names of files with macOS's metadata: `._1.jpg` beside `1.jpg`."""

_SYSTEM_PATTERN: Final = re.compile("|".join(map(fnmatch.translate, _SYSTEM_PATTERNS)))

_OTHER_FORMATS: Final[Mapping[str, str]] = {
    **dict.fromkeys((".jp2", ".j2k", ".jpf", ".jpx"), "JPEG 2000"),
    **dict.fromkeys((".jxr", ".wdp", ".hdp"), "JPEG XR"),
    **dict.fromkeys((".pgm", ".ppm", ".pbm", ".pnm", ".pam", ".pfm"), "PNM"),
    ".tga": "TGA",
    ".qoi": "QOI",
    ".pcx": "PCX",
    ".ico": "ICO",
    ".dds": "DDS",
    ".exr": "OpenEXR",
    ".hdr": "Radiance HDR",
    **dict.fromkeys((".fits", ".fit"), "FITS"),
    **dict.fromkeys((".dcm", ".dicom"), "DICOM"),
}
"""Suffixes of images that are not read, and the formats. The content of such a file decides first:
many a `.pgm` is a JPEG."""

# fmt: off
_RAW: Final = frozenset([
    ".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".iiq", ".kdc", ".mef",
    ".mos", ".mrw", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2",
    ".srf", ".srw", ".x3f",
])
# fmt: on
"""Suffixes of cameras' raw files. Many begin as a TIFF does, and are not opened."""

# fmt: off
_OTHER_FILES: Final = frozenset([
    ".txt", ".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".xml", ".yaml", ".yml", ".toml",
    ".ini", ".cfg", ".md", ".rst", ".html", ".htm", ".css", ".js", ".py", ".ipynb", ".sh", ".bat",
    ".m", ".r", ".log", ".sql", ".db", ".sqlite", ".xls", ".xlsx", ".ods", ".doc", ".docx",
    ".odt", ".ppt", ".pptx", ".pdf", ".ps", ".eps", ".ai", ".svg", ".psd", ".xcf", ".xmp", ".aae",
    ".thm", ".gpx", ".lnk", ".url", ".zip", ".tar", ".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz",
    ".zst", ".tzst", ".7z", ".rar", ".iso", ".dmg", ".mp4", ".mov", ".avi", ".mkv", ".webm",
    ".m4v", ".mpg", ".mpeg", ".wmv", ".3gp", ".mts", ".mp3", ".wav", ".flac", ".ogg", ".m4a",
    ".aac", ".npy", ".npz", ".mat", ".h5", ".hdf5", ".parquet", ".arrow", ".feather", ".tfrecord",
    ".record", ".pkl", ".pickle", ".pt", ".pth", ".safetensors", ".onnx", ".ckpt", ".pb",
    ".tflite", ".weights", ".exe", ".dll", ".so",
])
# fmt: on
"""Suffixes of files that are no images; these are not opened."""

# fmt: off
_BACKUPS: Final = frozenset([
    ".bak", ".old", ".orig", ".tmp", ".temp", ".part", ".partial", ".crdownload", ".download",
    ".opdownload", ".swp",
])
# fmt: on
"""Suffixes of backups and unfinished copies. What they hold may be an image, but no other one."""
_BACKUP: Final = re.compile(r"\.\w+_original|.*~")  # ExifTool; editors

_NO_SUFFIX: Final = "no suffix"
_NO_PHOTOS: Final = frozenset({"PDF", "EPS", "SVG", "WMF"})
"""Formats of `formats.unsupported` that hold documents and drawings."""
_HEAD: Final = 4096  # bytes

_OWN_PICTURES: Final = re.compile(
    r"(?:preview|photos|augment|schedule|ablation|lr_find-.*)\.png", re.DOTALL
)
_OWN_PICTURE: Final = b"tEXtSoftware\0" + SOFTWARE.encode()


class Kind(NamedTuple):
    """Why a file or a folder is passed over, and the detail that is counted with the reason."""

    reason: Reason
    detail: str


def is_image(name: str) -> bool:
    """Check whether a name has the suffix of an image, such as `.jpg`."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def system_kind(name: str, *, is_folder: bool) -> Kind | None:
    """Return why a file or folder of this name is passed over: as one of a system or tool, or None.

    Args:
        name: Name without the folders above.
        is_folder: Whether it is a folder, or a link to one.
    """
    if name.startswith(_APPLE_DOUBLE) and not is_folder:
        return Kind(Reason.SYSTEM, "._*")
    lower = name.lower()
    if is_folder:
        known = lower in _SYSTEM_FOLDERS or name in _EXACT_FOLDERS or _SYSTEM_PATTERN.match(lower)
        return Kind(Reason.SYSTEM, name) if known else None
    return Kind(Reason.SYSTEM, name) if lower in _SYSTEM_FILES else None


def member_kind(path: str) -> Kind | None:
    """Return why a member of an archive or an object at an address is passed over, or None.

    Its content is not looked at: it is an image if it has the suffix of one.

    Args:
        path: Names separated by `/`; the last one is that of a file.
    """
    if found := path_kind(path):
        return found
    name = path.rpartition("/")[2]
    return None if is_image(name) else _kind_by_suffix(name) or _no_image(name)


def path_kind(path: str) -> Kind | None:
    """Return why a file is passed over because of its name or of a folder's above it, or None."""
    *folders, name = [part for part in path.split("/") if part not in ("", ".", "..")] or [""]
    kinds = (named_kind(part, is_folder=True) for part in folders)
    return next(filter(None, kinds), None) or named_kind(name, is_folder=False)


def named_kind(name: str, *, is_folder: bool) -> Kind | None:
    """Return why a file or folder is passed over because of its name: system, tool or hidden."""
    found = system_kind(name, is_folder=is_folder)
    if found is None and name.startswith("."):
        return Kind(Reason.HIDDEN, name)
    return found


def file_kind(entry: os.DirEntry[str]) -> Kind | None:
    """Return why a file is passed over because of its suffix or content; None: it is an image.

    A file with the suffix of an image is not opened, unless it has the name of a picture that
    Fledge draws. Whether it can be decoded is found out by whoever reads it.
    """
    if is_image(entry.name):
        return own_picture_kind(entry)
    return _kind_by_suffix(entry.name, certain=True) or _kind_by_content(entry)


def own_picture_kind(entry: os.DirEntry[str]) -> Kind | None:
    """Return why a file is passed over if it is a picture that Fledge has drawn; None: it isn't."""
    if _OWN_PICTURES.fullmatch(entry.name) and _is_own_picture(entry.path):
        return Kind(Reason.OWN_OUTPUT, entry.name)
    return None


def folder_kind(folder: str) -> Kind | None:
    """Return why a folder is passed over because of a mark in it; None: it is searched."""
    for name, (reason, _) in _MARKS.items():
        if has_mark(folder, name):
            return Kind(reason, os.path.basename(folder))
    return None


def has_mark(folder: str, name: str) -> bool:
    """Whether a folder has the mark `name`, such as "run.json", with the content of a mark."""
    path = os.path.join(folder, name)
    return os.path.lexists(path) and _MARKS[name][1](Path(path))


def may_be_image(path: str) -> bool:
    """Return whether a file is an image by its suffix, or may be one by its content.

    Args:
        path: Names separated by `/`; the last one is that of a file.
    """
    return is_image(path) or _kind_by_suffix(path.rpartition("/")[2], certain=True) is None


def _kind_by_suffix(name: str, *, certain: bool = False) -> Kind | None:
    """Return why a file is passed over because of its suffix.

    Args:
        name: Name of the file.
        certain: Whether to return None where the content may say something else.
    """
    suffix = os.path.splitext(name)[1].lower()
    if suffix in _RAW:
        return Kind(Reason.UNSUPPORTED_FORMAT, f"raw {suffix}")
    if suffix in _OTHER_FILES:
        return Kind(Reason.NOT_AN_IMAGE, suffix)
    if suffix in _BACKUPS or _BACKUP.fullmatch(suffix or name[-1:]):
        return Kind(Reason.BACKUP, suffix or "~")
    if suffix in _OTHER_FORMATS and not certain:
        return Kind(Reason.UNSUPPORTED_FORMAT, _OTHER_FORMATS[suffix])
    return None


def _kind_by_content(entry: os.DirEntry[str]) -> Kind | None:
    suffix = os.path.splitext(entry.name)[1].lower()
    try:
        if not entry.is_file():
            there = os.path.exists(entry.path)
            return Kind(Reason.SPECIAL_FILE if there else Reason.BROKEN_LINK, entry.name)
        with open_regular(Path(entry.path)) as file:
            head = file.read(_HEAD)
    except OSError:
        return Kind(Reason.UNREADABLE_FILE, entry.name)
    if is_image_content(head):
        return None
    if suffix in _OTHER_FORMATS:
        return Kind(Reason.UNSUPPORTED_FORMAT, _OTHER_FORMATS[suffix])
    if not head:
        return Kind(Reason.EMPTY_FILE, suffix or _NO_SUFFIX)
    other = formats.unsupported(head)
    if other is not None and other not in _NO_PHOTOS:
        return Kind(Reason.UNSUPPORTED_FORMAT, other)
    return _no_image(entry.name)


def _no_image(name: str) -> Kind:
    return Kind(Reason.NOT_AN_IMAGE, os.path.splitext(name)[1].lower() or _NO_SUFFIX)


def is_image_content(head: bytes) -> bool:
    """Return whether a file that begins with `head` is an image of a format that is read."""
    return bool(formats.served(head)) or _is_bmp(head)


def _is_bmp(head: bytes) -> bool:
    """Whether a file begins as a BMP does: the signature, reserved zeros, a known header size."""
    return head[:2] == b"BM" and head[6:10] == bytes(4) and head[14:18] in _BMP_HEADERS


_BMP_HEADERS: Final = frozenset(size.to_bytes(4, "little") for size in (12, 40, 52, 56, 108, 124))


def _is_own_picture(path: str) -> bool:
    try:
        with open_regular(Path(path)) as file:
            return _OWN_PICTURE in file.read(_HEAD)
    except OSError:
        return False


def _has_keys(*keys: str) -> Callable[[Path], bool]:
    """Return a function that checks whether a file holds JSON with these keys."""

    def check(path: Path) -> bool:
        try:
            content: Any = json_reader.parse(read_limited(path, json_reader.MAX_BYTES))
        except (OSError, ValueError, RecursionError):
            return False
        return isinstance(content, dict) and set(keys) <= set(content)

    return check


def _is_cache_tag(path: Path) -> bool:
    try:
        with open_regular(path) as file:
            return file.read(len(_CACHE_TAG)) == _CACHE_TAG
    except OSError:
        return False


_CACHE_TAG: Final = b"Signature: 8a477f597d28d172789f06886806bc55"
"""Begins `CACHEDIR.TAG` in a folder of a cache (the Cache Directory Tagging Specification)."""

_MARKS: Final[Mapping[str, tuple[Reason, Callable[[Path], bool]]]] = {
    "run.json": (Reason.OWN_OUTPUT, _has_keys("source", "root", "fingerprint", "classes")),
    "manifest.json": (Reason.OWN_OUTPUT, _has_keys("labels", "precisions", "preprocess", "graph")),
    MARK: (Reason.OWN_OUTPUT, _has_keys("made_by")),
    "entry.json": (Reason.OWN_OUTPUT, _has_keys("fledge-cache")),
    "CACHEDIR.TAG": (Reason.SYSTEM, _is_cache_tag),
    "pyvenv.cfg": (Reason.SYSTEM, Path.is_file),
}
"""Files that mark the folder around them, and a function that checks their content."""
