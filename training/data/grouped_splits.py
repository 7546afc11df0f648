"""Draw splits in which photos that belong together, such as frames of a video, stay together."""

from __future__ import annotations

import difflib
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePath
from typing import Final

from serving.errors import OptionError
from training.utils.console import quoted

FOLDER: Final = "folder"
"""Value of `data.group` by which the photos of one folder stay together."""


def group_names(paths: Iterable[PurePath], group: str) -> list[str]:
    """Return for each photo the name of the group that stays together.

    Args:
        paths: Paths of the photos relative to the data folder.
        group: Value of `data.group`: `FOLDER`, or a regular expression that is searched in the path
            with `/`; its first group, or what it matches, is the name. A photo that it does not
            match is a group of its own.
    """
    if group == FOLDER:
        return [path.parent.as_posix() for path in paths]
    names = []
    for path in paths:
        match = re.search(group, path.as_posix())
        names.append(f"={match[match.re.groups and 1]}" if match else path.as_posix())
    return names


def check_groups(paths: Sequence[PurePath], groups: Sequence[str], group: str) -> None:
    """Check that `data.group` keeps some photos together.

    Args:
        paths: Paths of the photos relative to the data folder.
        groups: Name of each photo's group.
        group: Value of `data.group`.

    Raises:
        OptionError: It matches no path, or each photo is a group of its own.
    """
    given = f"data.group = {quoted(group)}"
    example = quoted(paths[0].as_posix())
    if group != FOLDER and not any(name.startswith("=") for name in groups):
        meant = difflib.get_close_matches(group.casefold(), [FOLDER], cutoff=0.7)
        remedy = (
            f"did you mean data.group={FOLDER}?" if meant
            else f"correct the regular expression, or give data.group={FOLDER}"
        )  # fmt: skip
        raise OptionError(f"{given} matches no path, such as {example}; {remedy}")
    if len(set(groups)) == len(groups) > 1:
        why = "no two are in one folder" if group == FOLDER else f"such as {example}"
        raise OptionError(
            f"{given} makes each of the {len(groups)} photos a group of its own ({why}), which has "
            "no effect; give a regular expression whose first group is what photos have in common, "
            "or leave the option out"
        )


def classes_of_one_group(labels: Sequence[str], groups: Sequence[str]) -> list[str]:
    """Return the classes whose photos are all in one group, in the order of the photos."""
    found: dict[str, set[str]] = {}
    for label, group in zip(labels, groups, strict=True):
        found.setdefault(label, set()).add(group)
    return [label for label, names in found.items() if len(names) == 1]


def grouped_holdout(
    labels: Sequence[str], groups: Sequence[str], share: float, seed: int
) -> list[bool]:
    """Choose at random which groups are held out for validation.

    A group is held out if that brings the numbers of held-out photos of its classes nearer to the
    share, and leaves photos of each class to train on. A class of one group is not held out.

    Args:
        labels: Class name of each photo.
        groups: Name of each photo's group.
        share: Share of each class to hold out.
        seed: Random seed.

    Returns:
        For each photo, whether it is held out.
    """
    totals = Counter(labels)
    wanted = {label: max(1, round(total * share)) for label, total in totals.items()}
    held, chosen = Counter[str](), set[str]()
    for name, counts in _shuffled(labels, groups, seed):
        before = sum(abs(wanted[label] - held[label]) for label in counts)
        after = sum(abs(wanted[label] - held[label] - n) for label, n in counts.items())
        missing = any(not held[label] for label in counts)
        left = all(held[label] + n < totals[label] for label, n in counts.items())
        if left and (after < before or missing):
            held += counts
            chosen.add(name)
    return [group in chosen for group in groups]


def grouped_folds(labels: Sequence[str], groups: Sequence[str], k: int, seed: int) -> list[int]:
    """Assign each group at random to one of k folds, of classes as even as the groups allow.

    The largest groups are assigned first, each to the fold that has the fewest photos of its
    classes.

    Args:
        labels: Class name of each photo.
        groups: Name of each photo's group.
        k: Number of folds.
        seed: Random seed.

    Returns:
        The fold of each photo, 0 to k - 1.
    """
    sizes = [Counter[str]() for _ in range(k)]
    fold_of: dict[str, int] = {}
    shuffled = sorted(_shuffled(labels, groups, seed), key=lambda item: -item[1].total())
    for name, counts in shuffled:
        loads = [sum(n * size[label] for label, n in counts.items()) for size in sizes]
        totals = [size.total() for size in sizes]
        fold_of[name] = min(range(k), key=lambda fold: (loads[fold], totals[fold]))
        sizes[fold_of[name]] += counts
    return [fold_of[group] for group in groups]


def _shuffled(
    labels: Sequence[str], groups: Sequence[str], seed: int
) -> Iterator[tuple[str, Counter[str]]]:
    """Yield each group with its numbers of photos by class, in random order."""
    counts: dict[str, Counter[str]] = {}
    for label, group in zip(labels, groups, strict=True):
        counts.setdefault(group, Counter())[label] += 1
    names = sorted(counts)
    random.Random(f"{seed}/groups").shuffle(names)
    for name in names:
        yield name, counts[name]
