"""Alpha and palettes: what is clear shows the background, and nothing else does."""

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
    fine,
    good,
    greys,
    quarters,
    scene,
)

ALPHA = "alpha-on-background"
SHARES = (0, 128, 255, 255)


def blend(colour: Colour, share: int) -> Colour:
    return tuple(round((value * share + 255 * (255 - share)) / 255) for value in colour)  # type: ignore[return-value]


BLENDED = tuple(blend(colour, share) for colour, share in zip(QUARTERS, SHARES, strict=True))


def clear(shares: tuple[int, ...] = SHARES) -> Image.Image:
    """The scene with an alpha for each quarter."""
    return Image.fromarray(np.dstack([SCENE, quarters(list(shares))]))


def paletted(**options: object) -> bytes:
    image = Image.fromarray(INDICES)
    image.putpalette(COLOURS)
    return encode(image, "PNG", **options)


def grey_alpha(*pairs: tuple[int, int]) -> np.ndarray:
    return quarters(list(pairs))


def items() -> list[Item]:
    opaque = clear((255,) * 4)
    premultiplied = np.dstack(
        [SCENE * (quarters(list(SHARES))[..., None] / 255), quarters(list(SHARES))]
    )
    pairs = ((90, 0), (90, 128), (90, 255), (200, 255))
    half = greys(255, 172, 90, 200)
    found = [
        good(f"rgba-{kind}", fine(clear(), kind), ALPHA, colours=BLENDED)
        for kind in ("PNG", "WEBP", "TIFF")
    ]
    found += [
        good("rgba-AVIF", fine(clear(), "AVIF"), ALPHA, colours=BLENDED, tolerance=8),
        good(
            "rgba-lossy-WEBP",
            encode(clear(), "WEBP", quality=95, exact=True),
            ALPHA,
            colours=BLENDED,
            tolerance=16,
        ),
        good("rgba-opaque-PNG", fine(opaque, "PNG"), ALPHA),
        good("rgba-opaque-WEBP", fine(opaque, "WEBP")),
        good("rgb-TIFF", fine(scene(), "TIFF")),
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
            "grey-and-spare-tiff",
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
            "rgb-and-spare-tiff",
            tiff(tags([8] * 4, 2, (338, SHORT, [0])), np.asarray(clear()).tobytes()),
        ),
        good("palette-png", paletted()),
        good(
            "palette-png-keyed", paletted(transparency=1), ALPHA, colours=(RED, WHITE, BLUE, YELLOW)
        ),
        good("palette-png-shares", paletted(transparency=bytes(SHARES)), ALPHA, colours=BLENDED),
        good("palette-png-opaque", paletted(transparency=b"\xff" * 4), ALPHA),
        good(
            "palette-png-short-shares",
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
                np.dstack([INDICES, quarters(list(SHARES))]).tobytes(),
            ),
            ALPHA,
            colours=BLENDED,
        ),
    ]
    return found


def tiff_palette() -> list[int]:
    """All reds, all greens, all blues, in 16 bits."""
    table = np.zeros((3, 256), int)
    table[:, :4] = np.array(QUARTERS).T * 257
    return table.ravel().tolist()  # type: ignore[no-any-return]
