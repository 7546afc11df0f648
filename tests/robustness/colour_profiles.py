"""ICC profiles: applied if they match the image's colour space, ignored otherwise."""

from __future__ import annotations

import zlib

import numpy as np
from PIL import Image, ImageCms

from tests.robustness import icc_profiles
from tests.robustness.file_builders import (
    GREY_ALPHA,
    SHORT,
    chunk,
    into_jpeg,
    png,
    segment,
    tags,
    tiff,
)
from tests.robustness.scene import (
    QUARTERS,
    SCENE,
    WHITE,
    Item,
    encode,
    encode_best,
    good,
    greys,
    quarters,
    scene,
)
from tests.robustness.transparency import grey_alpha, paletted, with_alpha

ALPHA, ICC = "alpha-on-background", "icc-to-srgb"


def items() -> list[Item]:
    srgb, lab = lcms_profile("sRGB"), lcms_profile("LAB")
    linear, swapped, grey = (
        icc_profiles.rgb(),
        icc_profiles.rgb(2.2, swapped=True),
        icc_profiles.grey(),
    )
    brighter = tuple(icc_profiles.linear_to_srgb(colour) for colour in QUARTERS)
    exchanged = tuple((green, red, blue) for red, green, blue in QUARTERS)
    grey_pixels = np.asarray(scene().convert("L"))
    shades = tuple((int(v),) * 3 for v in grey_pixels[[0, 0, -1, -1], [0, -1, 0, -1]])
    bright = tuple(icc_profiles.linear_to_srgb(shade) for shade in shades)
    pairs = grey_alpha((90, 0), (90, 255), (0, 255), (255, 255))
    lifted_grey = icc_profiles.linear_to_srgb((90, 90, 90))
    found = [
        good(
            f"icc-linear-{kind}",
            encode_best(scene(), kind, icc_profile=linear),
            ICC,
            colours=brighter,
            tolerance=12 if kind in ("JPEG", "AVIF") else 3,
        )
        for kind in ("PNG", "JPEG", "WEBP", "TIFF", "AVIF")
    ]
    found += [
        good(
            "icc-red-green-swapped-png",
            encode_best(scene(), "PNG", icc_profile=swapped),
            ICC,
            colours=exchanged,
            tolerance=8,
        ),
        *(
            good(f"icc-{name}-png", encode_best(scene(), "PNG", icc_profile=profile))
            for name, profile in {
                "srgb": srgb,
                "lab": lab,
                "grey-on-rgb": grey,
                "cmyk-on-rgb": icc_profiles.cmyk(),
            }.items()
        ),
        *(
            good(f"icc-{name}-png", encode_best(scene(), "PNG", icc_profile=profile), "icc-ignored")
            for name, profile in {
                "broken": b"not a profile",
                "cut-short": linear[:200],
                "zeros": bytes(500),
            }.items()
        ),
        good(
            "icc-grey-png",
            encode_best(scene().convert("L"), "PNG", icc_profile=grey),
            ICC,
            colours=bright,
        ),
        good(
            "icc-grey-jpeg",
            encode_best(scene().convert("L"), "JPEG", icc_profile=grey),
            ICC,
            colours=bright,
            tolerance=4,
        ),
        good(
            "icc-rgb-on-grey",
            encode_best(scene().convert("L"), "PNG", icc_profile=linear),
            colours=shades,
        ),
        good(
            "icc-grey-16-bit",
            encode(Image.fromarray(grey_pixels.astype(np.uint16) * 257), "PNG", icc_profile=grey),
            "16-bit-scaled",
            ICC,
            colours=bright,
        ),
        good(
            "icc-grey-and-alpha",
            png(pairs, 8, GREY_ALPHA, iccp(grey)),
            ALPHA,
            ICC,
            colours=(WHITE, lifted_grey, *greys(0, 255)),
        ),
        good(
            "icc-grey-and-alpha-premultiplied",
            tiff(
                tags([8, 8], 1, (338, SHORT, [1]), (34675, 7, list(grey))),
                grey_alpha((0, 0), (90, 255), (0, 255), (255, 255)).tobytes(),
            ),
            ALPHA,
            ICC,
            colours=(WHITE, lifted_grey, *greys(0, 255)),
        ),
        good(
            "icc-rgba",
            encode_best(with_alpha((0, 255, 255, 255)), "PNG", icc_profile=linear),
            ALPHA,
            ICC,
            colours=(WHITE, *brighter[1:]),
        ),
        good("icc-palette", paletted(icc_profile=linear), ICC, colours=brighter),
        good(
            "icc-palette-keyed",
            paletted(icc_profile=linear, transparency=0),
            ALPHA,
            ICC,
            colours=(WHITE, *brighter[1:]),
        ),
        good(
            "icc-cmyk-jpeg",
            encode_best(cyan_and_yellow(), "JPEG", icc_profile=icc_profiles.cmyk()),
            ICC,
            colours=greys(0, 255, 0, 255),
            tolerance=6,
        ),
        good(
            "icc-cmyk-tiff",
            encode_best(cyan_and_yellow(), "TIFF", icc_profile=icc_profiles.cmyk()),
            ICC,
            colours=greys(0, 255, 0, 255),
        ),
        good(
            "icc-rgb-on-cmyk",
            encode_best(scene().convert("CMYK"), "TIFF", icc_profile=linear),
            "cmyk-to-rgb",
        ),
        good(
            "icc-in-parts",
            into_jpeg(encode_best(scene(), "JPEG"), *icc_segments(linear, 2)),
            ICC,
            colours=brighter,
            tolerance=12,
        ),
        good(
            "icc-a-part-is-missing",
            into_jpeg(encode_best(scene(), "JPEG"), *icc_segments(linear, 2)[:1]),
            tolerance=8,
        ),
        good("icc-not-deflated", png(SCENE, 8, 2, chunk(b"iCCP", b"x\0\0" + linear))),
    ]
    return found


def lcms_profile(space: str) -> bytes:
    """A profile by LittleCMS, with its creation time set to zero."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile(space)).tobytes()
    return profile[:24] + bytes(12) + profile[36:]


def cyan_and_yellow() -> Image.Image:
    """A CMYK image: cyan on the left, yellow on the right."""
    return Image.fromarray(quarters([(255, 0, 0, 0), (0, 0, 255, 0)] * 2), "CMYK")


def iccp(profile: bytes) -> bytes:
    return chunk(b"iCCP", b"x\0\0" + zlib.compress(profile))


def icc_segments(profile: bytes, count: int) -> list[bytes]:
    """APP2 segments of a JPEG with the profile in `count` parts, in reverse order."""
    size = -(-len(profile) // count)
    cut = [profile[at : at + size] for at in range(0, len(profile), size)]
    made = [
        segment(0xE2, b"ICC_PROFILE\0" + bytes([number, count]) + part)
        for number, part in enumerate(cut, 1)
    ]
    return made[::-1]
