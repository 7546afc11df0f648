"""Describe a comparison of input sizes: the table of `--sizes`, and the report of `--size`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from export.input_size.compare import MAX_SIZES, SizeComparison, SizeResult
from export.precision import loss_bounds
from export.precision.verdict import DEFAULT_BUDGET
from serving.errors import OptionError
from serving.terminal import quote, quote_path

_HEAD = ("size", "accuracy", "change (95 %)", "loss", "images/s", "at best", "times as fast", "")


def parse(text: str) -> list[int]:
    """Parse sizes with commas between them, such as `160,192,224`.

    Raises:
        OptionError: A part is not a number, or has over four digits, or there are too many sizes.
    """
    parts = [part.strip() for part in text.split(",")]
    wrong = next((part for part in parts if not (part.isascii() and part.isdigit())), None)
    if wrong is not None:
        raise OptionError(f"--sizes {quote(text)}: write pixels with commas, such as 160,192,224")
    # Python converts no more than 4,300 digits.
    if large := next((part for part in parts if len(part) > 4), None):
        raise OptionError(f"--sizes {large[:12]}: use 8 to 4096 pixels")
    sizes = sorted({int(part) for part in parts})
    if len(sizes) > MAX_SIZES:
        raise OptionError(f"--sizes: {len(sizes)} sizes are too many; name up to {MAX_SIZES}")
    return sizes


def lines(found: SizeComparison) -> Iterator[str]:
    """Yield the lines of the table, and what it says."""
    rows = [_HEAD, *(_row(found, one) for one in found.results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD) - 1)]
    for *cells, verdict in rows:
        line = "  ".join([*map(str.rjust, cells, widths)])
        yield f"{line}  {verdict}".rstrip()
    yield f"accuracy and change, in points, against {found.trained}: on {_photos(found)}"
    yield "images/s: the float32 graph alone, without decoding, one at a time and in batches"
    yield _advice(found)


def command(
    run: Path,
    size: int | None,
    *,
    data: Path | None = None,
    photos: Path | None = None,
    folds: Sequence[Path] = (),
    budget: float = DEFAULT_BUDGET,
) -> str:
    """Return the command that exports a run at a size; None: at the size of the training."""
    words = ["fledge export", quote_path(run)]
    for option, path in (("--data", data), ("--photos", photos)):
        words += [option, quote_path(path)] if path is not None else []
    words += ["--folds", *map(quote_path, folds)] if folds else []
    words += ["--size", str(size)] if size is not None else []
    words += ["--accuracy-budget", f"{budget:g}"] if budget != DEFAULT_BUDGET else []
    return " ".join(words)


def summary(found: SizeComparison, size: int) -> str:
    """Describe the comparison of a size with the trained size in one line."""
    one, trained = found.at(size), found.at(found.trained)
    refused, doubt = found.refusal_reason(one), found.doubt(one)
    if refused:
        result = f"refused: {refused}"
    else:
        result = f"kept, as --size {size} asks, though {doubt}" if doubt else "kept"
    return (
        f"size {size} {result}; on {_photos(found)} {one.accuracy:.2%}, at the trained size "
        f"{found.trained} {trained.accuracy:.2%} (a change of {_change(one)} points; it "
        f"falls by at most {one.drop.at_most:.2f} with 95 % confidence), "
        f"{one.speedup:.2f} times as fast; at best {one.fastest:.0f} and {trained.fastest:.0f} "
        "images/s"
    )


def report(found: SizeComparison, size: int) -> dict[str, Any]:
    """Return the entry `size` of the manifest's `parity`."""
    figures = found.to_dict()
    rows = {row["size"]: row for row in figures.pop("sizes")}
    return figures | {"trained": rows[found.trained], "exported": rows[size]}


def _photos(found: SizeComparison) -> str:
    folds = f", {found.folds} of them of other folds" if found.folds else ""
    skipped = f" ({found.skipped} more can't be decoded)" if found.skipped else ""
    return f"{found.photos:,} held-out photos{folds}{skipped}"


def _change(one: SizeResult) -> str:
    """Format the change of the accuracy in points, such as `-0.45 (-2.21 to +1.31)`."""
    low, high = one.drop.interval
    return f"{0 - one.drop.drop:+.2f} ({0 - high:+.2f} to {0 - low:+.2f})"


def _row(found: SizeComparison, one: SizeResult) -> tuple[str, ...]:
    is_trained = one.size == found.trained
    return (
        str(one.size),
        f"{one.accuracy:.2%}",
        "" if is_trained else _change(one),
        f"{one.loss:.4f}",
        f"{one.single:.0f}",
        f"{one.fastest:.0f}",
        f"{one.speedup:.2f}",
        "trained size" if is_trained else _verdict(found, one),
    )


def _verdict(found: SizeComparison, one: SizeResult) -> str:
    if found.refusal_reason(one):
        return f"refused: falls by at least {one.drop.at_least:.2f}"
    if one.drop.at_most < 0:
        return "surely more accurate"
    if found.doubt(one):
        return f"may fall by up to {one.drop.at_most:.2f}"
    return f"surely within {found.budget:g}"


def _advice(found: SizeComparison) -> str:
    one = found.advised
    if one.drop.at_most < 0:
        return f"{one.size} is the most accurate of the sizes that are surely better"
    if one.size != found.trained:
        return f"{one.size} is the smallest of the sizes that surely cost at most {found.budget:g}"
    least = 100 * loss_bounds.least_budget(found.photos)
    return (
        f"no other size is surely better, or smaller and surely within {found.budget:g} points of "
        f"the trained size ({found.photos:,} photos can show {least:.2f} at best); --size keeps "
        "every size that is not refused"
    )
