"""Names of folders and files are unique on disks of all kinds."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest

from serving.utils.file_names import UniqueNames, folder_names, longest_name


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["cat", "dog"], ["cat", "dog"]),
        (["a/b", "a_b", "A_B"], ["a_b-3", "a_b", "A_B-2"]),
        (["a", "A", "_errors", "_Errors"], ["a", "A-2", "_errors-2", "_Errors-3"]),
        (["CON", "con", "_CON", "nul.txt", "COM1", "console"],
         ["_CON-2", "_con-3", "_CON", "_nul.txt", "_COM1", "console"]),
        (["a.", "a", "a..", " a", "."], ["a-2", "a", "a-3", "a-4", "_"]),
        (["..", "../../x", "/", ""], ["_", ".._x-2", "_-2", "_-3"]),
        (["\xe9", "e\u0301", "\xc9"], ["\xe9", "e\u0301-2", "\xc9-3"]),
        (["a-2", "a/", "a_", "a_-2"], ["a-2", "a_-3", "a_", "a_-2"]),
        (["stra\xdfe", "STRASSE"], ["stra\xdfe", "STRASSE-2"]),
    ],
)  # fmt: skip
def test_no_two_labels_have_the_same_folder(labels: list[str], names: list[str]) -> None:
    found = folder_names(labels, UniqueNames(255, ["_errors"]))
    if ".._x-2" in names:  # the order of the numbers does not matter here
        assert len(set(found.values())) == len(labels)
        assert not {"", ".", ".."} & set(found.values())
    else:
        assert [found[label] for label in labels] == names
    keys = {unicodedata.normalize("NFC", name).casefold() for name in found.values()}
    assert len(keys) == len(labels)


@pytest.mark.parametrize("longest", [255, 143, 20])
def test_names_are_as_long_as_the_disk_takes(longest: int) -> None:
    names = UniqueNames(longest)
    given = [names.add("n" * 300, ".jpg") for _ in range(12)]
    given += [names.add("\xe9" * 200, ".jpg") for _ in range(3)]
    given += [names.add("x", "." + "s" * 300), names.add(os.fsdecode(b"\xff" * 300))]
    assert len(set(given)) == len(given)
    assert max(len(os.fsencode(name)) for name in given) == longest
    assert given[0].endswith(".jpg")
    assert given[11].endswith("-12.jpg")


def test_the_limit_of_a_folder_that_does_not_exist_is_that_of_its_disk(tmp_path: Path) -> None:
    assert longest_name(tmp_path / "a" / "b") == min(255, os.pathconf(tmp_path, "PC_NAME_MAX"))
