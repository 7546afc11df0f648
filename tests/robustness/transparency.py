"""Alpha channels and palettes: transparent pixels are blended with the background."""

from __future__ import annotations

import numpy as np
from PIL import Image

from tests.robustness.file_builders import (
    COLOURS,
    GREY_ALPHA,
    PALETTE,
    PLTE,
    SHORT,
    chunk,
    png,
    tags,
    tiff,
)
from tests.robustness.scene import (
    BLUE,
    GREEN,
    INDICES,
    QUARTERS,
    RED,
    SCENE,
    WHITE,
    YELLOW,
    Colour,
    Item,
    encode,
    encode_best,
    good,
    greys,
    quarters,
    scene,
)

ALPHA = "alpha-on-background"
ALPHAS = (0, 128, 255, 255)


def blend(colour: Colour, alpha: int) -> Colour:
    return tuple(round((value * alpha + 255 * (255 - alpha)) / 255) for value in colour)  # type: ignore[return-value]


BLENDED = tuple(blend(colour, alpha) for colour, alpha in zip(QUARTERS, ALPHAS, strict=True))


def with_alpha(alphas: tuple[int, ...] = ALPHAS) -> Image.Image:
    """The scene with an alpha value for each quarter."""
    return Image.fromarray(np.dstack([SCENE, quarters(list(alphas))]))


def paletted(**options: object) -> bytes:
    image = Image.fromarray(INDICES)
    image.putpalette(COLOURS)
    return encode(image, "PNG", **options)


def grey_alpha(*pairs: tuple[int, int]) -> np.ndarray:
    return quarters(list(pairs))


def items() -> list[Item]:
    opaque = with_alpha((255,) * 4)
    premultiplied = np.dstack(
        [SCENE * (quarters(list(ALPHAS))[..., None] / 255), quarters(list(ALPHAS))]
    )
    pairs = ((90, 0), (90, 128), (90, 255), (200, 255))
    half = greys(255, 172, 90, 200)
    found = [
        good(f"rgba-{kind}", encode_best(with_alpha(), kind), ALPHA, colours=BLENDED)
        for kind in ("PNG", "WEBP", "TIFF")
    ]
    found += [
        good("rgba-AVIF", encode_best(with_alpha(), "AVIF"), ALPHA, colours=BLENDED, tolerance=8),
        good(
            "rgba-lossy-WEBP",
            encode(with_alpha(), "WEBP", quality=95, exact=True),
            ALPHA,
            colours=BLENDED,
            tolerance=16,
        ),
        good("rgba-opaque-PNG", encode_best(opaque, "PNG"), ALPHA),
        good("rgba-opaque-WEBP", encode_best(opaque, "WEBP")),
        good("rgb-TIFF", encode_best(scene(), "TIFF")),
        good("grey-and-alpha-png", png(grey_alpha(*pairs), 8, GREY_ALPHA), ALPHA, colours=half),
        good(
            "grey-and-alpha-tiff",
            tiff(tags([8, 8], 1, (338, SHORT, [2])), grey_alpha(*pairs).tobytes()),
            ALPHA,
            colours=half,
        ),
        good(
            "grey-and-alpha-tiff-premultiplied",
            tiff(
                tags([8, 8], 1, (338, SHORT, [1])),
                grey_alpha((0, 0), (45, 128), (90, 255), (200, 255)).tobytes(),
            ),
            ALPHA,
            colours=half,
        ),
        good(
            "grey-and-extra-sample-tiff",
            tiff(tags([8, 8], 1, (338, SHORT, [0])), grey_alpha(*pairs).tobytes()),
            colours=greys(90, 90, 90, 200),
        ),
        good(
            "rgba-tiff-premultiplied",
            tiff(
                tags([8] * 4, 2, (338, SHORT, [1])),
                premultiplied.round().astype(np.uint8).tobytes(),
            ),
            ALPHA,
            colours=BLENDED,
        ),
        good(
            "rgb-and-extra-sample-tiff",
            tiff(tags([8] * 4, 2, (338, SHORT, [0])), np.asarray(with_alpha()).tobytes()),
        ),
        good("palette-png", paletted()),
        good(
            "palette-png-keyed", paletted(transparency=1), ALPHA, colours=(RED, WHITE, BLUE, YELLOW)
        ),
        good("palette-png-alphas", paletted(transparency=bytes(ALPHAS)), ALPHA, colours=BLENDED),
        good("palette-png-opaque", paletted(transparency=b"\xff" * 4), ALPHA),
        good(
            "palette-png-short-alphas",
            png(INDICES, 8, PALETTE, PLTE + chunk(b"tRNS", b"\0")),
            ALPHA,
            colours=(WHITE, *QUARTERS[1:]),
        ),
        *(
            good(
                f"palette-png-of-{depth}-bits",
                png(INDICES % 2**depth, depth, PALETTE, PLTE),
                colours=colours,
            )
            for depth, colours in ((1, (RED, GREEN, RED, GREEN)), (2, QUARTERS), (4, QUARTERS))
        ),
        good(
            "palette-png-of-one-colour",
            png(INDICES * 0, 8, PALETTE, chunk(b"PLTE", bytes(YELLOW))),
            colours=(YELLOW,) * 4,
        ),
        good("palette-tiff", tiff(tags([8], 3, (320, SHORT, tiff_palette())), INDICES.tobytes())),
        good(
            "palette-and-alpha-tiff",
            tiff(
                tags([8, 8], 3, (320, SHORT, tiff_palette()), (338, SHORT, [2])),
                np.dstack([INDICES, quarters(list(ALPHAS))]).tobytes(),
            ),
            ALPHA,
            colours=BLENDED,
        ),
    ]
    return found


def tiff_palette() -> list[int]:
    """A TIFF colour map: all reds, all greens, all blues, in 16 bits."""
    table = np.zeros((3, 256), int)
    table[:, :4] = np.array(QUARTERS).T * 257
    return table.ravel().tolist()  # type: ignore[no-any-return]
