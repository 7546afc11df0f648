"""Draw an augmentation as a contact sheet: a photo, random augmentations of it, and the options."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
from PIL import Image, ImageDraw, ImageFont

from serving.imaging import decode
from serving.imaging.preprocess import Pixels, Preprocess
from serving.utils.files import atomic_write
from training.augmentation import transforms
from training.config.sections import AugmentConfig
from training.pixels.transform import PixelTransform
from training.preview.figure import png_info

COLUMNS: Final = 5
TILE: Final = 192  # pixels
GAP: Final = 8
_FONT: Final = 18
_INK, _PAPER, _MARK = "#222222", "#ffffff", "#c2410c"


def write(
    photo: Path,
    config: AugmentConfig,
    preprocess: Preprocess,
    presize: float,
    path: Path,
    *,
    draws: int = 24,
    seed: int = 0,
) -> None:
    """Write a contact sheet of one photo as PNG.

    The first picture, with a frame, is the photo as in validation and in the service. The other
    pictures are random augmentations as in training. The text below is `describe(config)`.

    Args:
        photo: Path of an image file.
        config: The augmentation. Mixup and cutmix are only named in the text, because they combine
            two photos.
        preprocess: Preprocessing of the model, with the size of the pictures.
        presize: Side of the cached training photos, as a multiple of the image size.
        path: File to write.
        draws: Number of random augmentations.
        seed: Seed of the random augmentations.

    Raises:
        ImageError: The photo can't be read.
    """
    pixel_transform = PixelTransform("train", preprocess, presize)
    seen = decode.read(photo, preprocess=preprocess)
    tiles = [
        preprocess(seen.image, seen.area),
        *_draws(photo, config, pixel_transform, draws, seed),
    ]
    sheet = _lay_out(tiles, "marked: the photo as validation sees it", describe(config))
    with atomic_write(path) as partial:
        sheet.save(partial, format="PNG", pnginfo=png_info())


def _draws(
    photo: Path,
    config: AugmentConfig,
    pixel_transform: PixelTransform,
    count: int,
    seed: int,
) -> Pixels:
    """Return random augmentations of a photo, as in training: uint8 [count, size, size, 3]."""
    decoded = decode.read(photo, preprocess=pixel_transform.to_square)
    square = pixel_transform(decoded).copy()  # torch needs a writable array
    pixels = torch.from_numpy(square).expand(count, -1, -1, -1)
    aspect = torch.full((count,), pixel_transform.aspect(decoded))
    drawn = transforms.draw(config, aspect, seed, 0, crop=pixel_transform.preprocess.kept_share)
    with torch.no_grad():
        changed = transforms.apply(pixels, drawn, config, pixel_transform.preprocess.size)
    return changed.round().to(torch.uint8).numpy()


def _lay_out(tiles: list[Pixels], mark: str, text: str) -> Image.Image:
    step, line = TILE + GAP, round(_FONT * 1.4)
    width, below = COLUMNS * step + GAP, -(-len(tiles) // COLUMNS) * step + GAP
    font = ImageFont.load_default(_FONT)
    lines = [mark, *_wrapped(text, lambda words: font.getlength(words) <= width - 2 * GAP)]
    sheet = Image.new("RGB", (width, below + len(lines) * line + GAP), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, tile in enumerate(tiles):
        left, top = GAP + number % COLUMNS * step, GAP + number // COLUMNS * step
        sheet.paste(Image.fromarray(tile).resize((TILE, TILE)), (left, top))
    pen.rectangle((GAP - 4, GAP - 4, GAP + TILE + 3, GAP + TILE + 3), outline=_MARK, width=4)
    for number, words in enumerate(lines):
        ink = _INK if number else _MARK
        pen.text((GAP, below + number * line), words, fill=ink, font=font)
    return sheet


def _wrapped(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Break the text into lines that fit, only after commas between options."""
    lines = [""]
    for part in text.split(", "):
        longer = f"{lines[-1]}, {part}" if lines[-1] else part
        if lines[-1] and not fits(longer + ","):
            lines[-1] += ","
            lines.append(part)
        else:
            lines[-1] = longer
    return lines


def describe(config: AugmentConfig) -> str:
    """Describe an augmentation in words: preset and options, such as "photo: random crop, flip"."""
    c = config
    low, high = c.scale
    area = "" if low == 1 else f" of {low * 100:.0f}-{high * 100:.0f} % of the largest square"
    policies = {
        "none": "",
        "rand_augment": f"RandAugment with {c.policy_ops} operations of {c.policy_magnitude} / 30",
        "trivial_augment": "TrivialAugment",
    }
    parts = [
        ("random crop" if c.crop == "random" else "centre crop") + area,
        f"sides up to {c.ratio:g} : 1" if c.ratio > 1 else "",
        {"none": "", "horizontal": "flip", "dihedral": "flips and quarter turns"}[c.flip],
        f"rotation ±{c.max_rotate:g}°" if c.max_rotate else "",
        f"zoom to {c.max_zoom:g}" if c.max_zoom > 1 else "",
        _percent("shift", c.max_shift),
        _percent("perspective", c.max_warp),
        policies[c.policy],
        _percent("brightness and contrast", c.max_lighting),
        _percent("saturation", c.max_saturation),
        f"hue ±{c.max_hue * 360:g}°" if c.max_hue else "",
        f"a rectangle erased in {c.erase * 100:.0f} % of the draws" if c.erase else "",
        f"mixup {c.mixup:g} (blends two photos: not shown)" if c.mixup else "",
        f"cutmix {c.cutmix:g} (joins two photos: not shown)" if c.cutmix else "",
    ]
    changed = "" if config == AugmentConfig(preset=config.preset) else ", changed"
    return f"{config.preset}{changed}: {', '.join(part for part in parts if part)}"


def _percent(name: str, most: float) -> str:
    return f"{name} ±{most * 100:g} %" if most else ""
