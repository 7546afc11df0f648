"""What the folders of a data set were read as: photos, their labels and parts, and roles."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from training.data.folders.photo_tree import CLASS, PhotoFolder

PARTS: Final = ("train", "valid", "test")


@dataclass
class Structure:
    """How the folders of a data set were read.

    Attributes:
        photos: Path relative to the data folder, label and part ("" if none) of each photo.
        unlabelled: Paths of the photos of a test part without class folders.
        empty: Paths of class folders without photos.
        roles: Path of a folder -> what it was read as.
        line: One line about the layout.
        warning: What may be wrong with it, or "".
    """

    photos: list[tuple[str, str, str]] = field(default_factory=list)
    unlabelled: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    roles: dict[str, str] = field(default_factory=dict)
    line: str = ""
    warning: str = ""

    def add_classes(self, folders: Iterable[PhotoFolder], part: str = "") -> None:
        """Add class folders, whose names are the labels."""
        for folder in folders:
            self.roles[folder.path] = CLASS
            self.photos += [(path, folder.name, part) for path in folder.below()]

    def add_unlabelled(self, folder: PhotoFolder) -> None:
        """Add a folder of photos without labels."""
        self.roles[folder.path] = "unlabelled"
        self.unlabelled += folder.below()

    def draw_validation(self) -> None:
        """Let the validation photos be drawn from those of the part train."""
        self.photos = [
            (path, label, "" if part == "train" else part) for path, label, part in self.photos
        ]
        self.line += "; validation photos are drawn from those of train (data.valid)"

    def counts(self, part: str) -> int:
        """Return the number of photos of a part."""
        return sum(1 for _, _, own in self.photos if own == part)
