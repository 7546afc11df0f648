"""Convert decoded images of any mode to RGB with 8 bits per channel, whole or reduced by strips."""

from __future__ import annotations

from PIL import Image

from serving.imaging import deep_samples, icc
from serving.imaging.preprocess import STRIP

Colour = tuple[int, int, int]


def to_rgb(
    image: Image.Image, background: Colour, applied: list[str], reduction: int = 1
) -> Image.Image:
    """Convert a loaded image to RGB, and reduce it by an integer.

    Args:
        image: The image.
        background: RGB colour, 0 to 255, on which a transparent image is composited.
        applied: List to which the names of the conversions are appended, some of them repeatedly.
        reduction: Each square of so many pixels becomes one, their mean. Then the image is
            converted by strips, because the whole one in RGB is not needed.
    """
    profile = image.info.get("icc_profile")
    # The profile of a TIFF may be a tag of numbers.
    if profile and not (isinstance(profile, bytes) and icc.is_safe(profile)):
        profile = None
        applied.append("icc-ignored")
    alpha: Image.Image | None = None
    if image.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
        applied.append("16-bit-scaled" if image.mode != "F" else "float-scaled")
        key = image.info.get("transparency")
        if key is not None:
            applied.append("alpha-on-background")
            alpha = Image.fromarray(
                deep_samples.by_strips(image, lambda strip: 255 * (strip != key))
            )
        image = deep_samples.scale(image)
    if reduction == 1:
        return _flatten(image, alpha, profile, background, applied)
    if image.mode == "RGB" and not profile and image.info.get("transparency") is None:
        return image.reduce(reduction)
    width, height = image.size
    reduced = Image.new("RGB", (-(-width // reduction), -(-height // reduction)))
    step = max(1, STRIP // (width * reduction)) * reduction
    for top in range(0, height, step):
        box = (0, top, width, min(top + step, height))
        own_alpha = alpha.crop(box) if alpha else None
        # In one expression, so that a strip is freed before the next one is converted.
        reduced.paste(
            _flatten(image.crop(box), own_alpha, profile, background, applied).reduce(reduction),
            (0, top // reduction),
        )
    return reduced


def _flatten(
    image: Image.Image,
    alpha: Image.Image | None,
    profile: bytes | None,
    background: Colour,
    applied: list[str],
) -> Image.Image:
    """Convert an image of at most 8 bits per channel to RGB; `alpha` is that of deep samples."""
    key = image.info.get("transparency") if alpha is None else None
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or key is not None:
        applied.append("alpha-on-background")
        grey = image.mode in ("LA", "La", "L", "1")
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA") if image.mode != "RGBA" else image
        alpha = image.getchannel("A")
        if profile:  # the profile applies to the image, not to the background
            image = image.getchannel("R") if grey else image.convert("RGB")
    elif image.mode == "P" and profile:
        image = image.convert("RGB")
    srgb = icc.to_srgb(image, profile) if profile and image.mode in ("RGB", "CMYK", "L") else None
    if srgb is not None:
        applied.append("icc-to-srgb")
        image = srgb
    if image.mode not in ("RGB", "RGBA", "L", "1", "P"):  # these convert without loss
        applied.append(f"{image.mode.lower()}-to-rgb")
    if alpha is None:
        return image if image.mode == "RGB" else image.convert("RGB")
    flat = Image.new("RGB", image.size, background)
    flat.paste(image, mask=alpha)
    return flat
