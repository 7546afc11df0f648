"""ICC profiles: obeyed where they fit the picture, left alone where they don't."""

from __future__ import annotations

import zlib

import numpy as np
from PIL import Image, ImageCms

from tests.robustness import icc_profiles
from tests.robustness.file_builders import (
    GREY_ALPHA,
    chunk,
    into_jpeg,
    png,
    segment,
)
from tests.robustness.scene import (
    QUARTERS,
    SCENE,
    WHITE,
    Item,
    encode,
    fine,
    good,
    greys,
    quarters,
    scene,
)
from tests.robustness.transparency import clear, grey_alpha, paletted

ALPHA, ICC = "alpha-on-background", "icc-to-srgb"


def items() -> list[Item]:
    srgb, lab = made_by_lcms("sRGB"), made_by_lcms("LAB")
    linear, swapped, grey = (
        icc_profiles.rgb(),
        icc_profiles.rgb(2.2, swapped=True),
        icc_profiles.grey(),
    )
    lifted = tuple(icc_profiles.lifted(colour) for colour in QUARTERS)
    exchanged = tuple((green, red, blue) for red, green, blue in QUARTERS)
    dull = np.asarray(scene().convert("L"))
    shades = tuple((int(v),) * 3 for v in dull[[0, 0, -1, -1], [0, -1, 0, -1]])
    bright = tuple(icc_profiles.lifted(shade) for shade in shades)
    pairs = grey_alpha((90, 0), (90, 255), (0, 255), (255, 255))
    lit = icc_profiles.lifted((90, 90, 90))
    found = [
        good(
            f"icc-linear-{kind}",
            fine(scene(), kind, icc_profile=linear),
            ICC,
            colours=lifted,
            tolerance=12 if kind in ("JPEG", "AVIF") else 3,
        )
        for kind in ("PNG", "JPEG", "WEBP", "TIFF", "AVIF")
    ]
    found += [
        good(
            "icc-exchanged-png",
            fine(scene(), "PNG", icc_profile=swapped),
            ICC,
            colours=exchanged,
            tolerance=8,
        ),
        *(
            good(f"icc-{name}-png", fine(scene(), "PNG", icc_profile=profile))
            for name, profile in {
                "srgb": srgb,
                "broken": b"not a profile",
                "cut-short": linear[:200],
                "nought": bytes(500),
                "lab": lab,
                "of-grey-on-colour": grey,
                "of-inks-on-colour": icc_profiles.cmyk(),
            }.items()
        ),
        good(
            "icc-grey-png", fine(scene().convert("L"), "PNG", icc_profile=grey), ICC, colours=bright
        ),
        good(
            "icc-grey-jpeg",
            fine(scene().convert("L"), "JPEG", icc_profile=grey),
            ICC,
            colours=bright,
            tolerance=4,
        ),
        good(
            "icc-of-colour-on-grey",
            fine(scene().convert("L"), "PNG", icc_profile=linear),
            colours=shades,
        ),
        good(
            "icc-grey-16-bit",
            encode(Image.fromarray(dull.astype(np.uint16) * 257), "PNG", icc_profile=grey),
            "16-bit-scaled",
            ICC,
            colours=bright,
        ),
        good(
            "icc-grey-and-alpha",
            png(pairs, 8, GREY_ALPHA, iccp(grey)),
            ALPHA,
            ICC,
            colours=(WHITE, lit, *greys(0, 255)),
        ),
        good(
            "icc-rgba",
            fine(clear((0, 255, 255, 255)), "PNG", icc_profile=linear),
            ALPHA,
            ICC,
            colours=(WHITE, *lifted[1:]),
        ),
        good("icc-palette", paletted(icc_profile=linear), ICC, colours=lifted),
        good(
            "icc-palette-keyed",
            paletted(icc_profile=linear, transparency=0),
            ALPHA,
            ICC,
            colours=(WHITE, *lifted[1:]),
        ),
        good(
            "icc-cmyk-jpeg",
            fine(inked(), "JPEG", icc_profile=icc_profiles.cmyk()),
            ICC,
            colours=greys(0, 255, 0, 255),
            tolerance=6,
        ),
        good(
            "icc-cmyk-tiff",
            fine(inked(), "TIFF", icc_profile=icc_profiles.cmyk()),
            ICC,
            colours=greys(0, 255, 0, 255),
        ),
        good(
            "icc-of-colour-on-cmyk",
            fine(scene().convert("CMYK"), "TIFF", icc_profile=linear),
            "cmyk-to-rgb",
        ),
        good(
            "icc-in-parts",
            into_jpeg(fine(scene(), "JPEG"), *parts(linear, 2)),
            ICC,
            colours=lifted,
            tolerance=12,
        ),
        good(
            "icc-a-part-is-missing",
            into_jpeg(fine(scene(), "JPEG"), *parts(linear, 2)[:1]),
            tolerance=8,
        ),
        good("icc-not-deflated", png(SCENE, 8, 2, chunk(b"iCCP", b"x\0\0" + linear))),
    ]
    return found


def made_by_lcms(space: str) -> bytes:
    """A profile, without the time at which it was made."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile(space)).tobytes()
    return profile[:24] + bytes(12) + profile[36:]


def inked() -> Image.Image:
    """Cyan to the left, yellow to the right."""
    return Image.fromarray(quarters([(255, 0, 0, 0), (0, 0, 255, 0)] * 2), "CMYK")


def iccp(profile: bytes) -> bytes:
    return chunk(b"iCCP", b"x\0\0" + zlib.compress(profile))


def parts(profile: bytes, count: int) -> list[bytes]:
    """A profile over several segments of a JPEG, the last first."""
    size = -(-len(profile) // count)
    cut = [profile[at : at + size] for at in range(0, len(profile), size)]
    made = [
        segment(0xE2, b"ICC_PROFILE\0" + bytes([number, count]) + part)
        for number, part in enumerate(cut, 1)
    ]
    return made[::-1]
