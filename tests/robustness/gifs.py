"""GIF: palettes, frames, disposal, extensions, broken blocks."""

from __future__ import annotations

import struct

import numpy as np

from tests.robustness.file_builders import COLOURS, gif, gif_control, gif_frame, sub_blocks
from tests.robustness.scene import (
    INDICES,
    QUARTERS,
    SIZE,
    WHITE,
    YELLOW,
    Item,
    bad,
    encode,
    good,
    greys,
    scene,
)

FIRST, ALPHA = "first-frame", "alpha-on-background"
OTHER = INDICES[::-1, ::-1]
INTERLACED = np.concatenate(
    [INDICES[start::step] for start, step in ((0, 8), (4, 8), (2, 4), (1, 2))]
)


def items() -> list[Item]:
    frame, second = gif_frame(INDICES), gif_frame(OTHER)
    on_white = (WHITE, *QUARTERS[1:])
    comment = b"!\xfe" + sub_blocks(b"a comment " * 1000)
    loop = b"!\xff\x0bNETSCAPE2.0\3\1\0\0\0"
    return [
        good("gif", gif(frame, palette=COLOURS)),
        good("gif-by-pillow", encode(scene(), "GIF")),
        good("gif-87a", gif(frame, palette=COLOURS, version=b"87a")),
        good("gif-own-palette", gif(gif_frame(INDICES, COLOURS))),
        good("gif-own-palette-wins", gif(gif_frame(INDICES, COLOURS), palette=COLOURS[::-1])),
        good("gif-without-palette", gif(frame), colours=greys(0, 1, 2, 3)),
        good("gif-interlaced", gif(gif_frame(INTERLACED, flags=64), palette=COLOURS)),
        good(
            "gif-keyed",
            gif(gif_frame(INDICES, control=gif_control(0, 0)), palette=COLOURS),
            ALPHA,
            colours=on_white,
        ),
        good(
            "gif-keyed-unused-colour",
            gif(gif_frame(INDICES, control=gif_control(0, 200)), palette=COLOURS),
            ALPHA,
        ),
        good("gif-comment", gif(comment, frame, palette=COLOURS)),
        good(
            "gif-unknown-extension", gif(b"!\x42" + sub_blocks(b"?" * 300), frame, palette=COLOURS)
        ),
        good("gif-without-an-end", gif(frame, palette=COLOURS, end=b"")),
        good("gif-trailing-garbage", gif(frame, palette=COLOURS) + bytes(1000)),
        good("gif-garbage-between-blocks", gif(b"\0\0\0", frame, palette=COLOURS)),
        good("gif-two-frames", gif(loop, frame, second, palette=COLOURS), FIRST),
        good(
            "gif-two-frames-by-pillow",
            encode(scene(), "GIF", save_all=True, append_images=[scene().rotate(180)]),
            FIRST,
        ),
        *(
            good(
                f"gif-disposal-{disposal}{'-keyed' * (transparent is not None)}",
                gif(
                    gif_frame(INDICES, control=gif_control(disposal, transparent)),
                    gif_frame(OTHER, control=gif_control(disposal, transparent)),
                    palette=COLOURS,
                ),
                FIRST,
                *([ALPHA] if transparent is not None else []),
                colours=QUARTERS if transparent is None else on_white,
            )
            for disposal in (1, 2, 3, 7)
            for transparent in (None, 0)
        ),
        good(
            "gif-first-frame-covers-a-corner",
            gif(gif_frame(INDICES[16:, 32:], at=(32, 16)), second, palette=COLOURS),
            FIRST,
            ALPHA,
            colours=(WHITE, WHITE, WHITE, YELLOW),
        ),
        good(
            "gif-frame-beyond-the-screen",
            gif(gif_frame(INDICES), palette=COLOURS, size=(10, 10)),
        ),
        good(
            "gif-first-frame-transparent",
            gif(gif_frame(INDICES * 0, control=gif_control(1, 0)), second, palette=COLOURS),
            FIRST,
            ALPHA,
            colours=(WHITE,) * 4,
        ),
        good("gif-zero-size-screen", gif(frame, palette=COLOURS, size=(0, 0))),
        bad(
            "gif-zero-size-first-frame",
            gif(gif_frame(INDICES, claims=(0, 0)), second, palette=COLOURS),
        ),
        bad("gif-without-frames", gif(palette=COLOURS)),
        bad("gif-comments-only", gif(comment, palette=COLOURS)),
        bad("gif-header-only", b"GIF89a"),
        bad(
            "gif-zero-size-frame",
            gif(gif_frame(INDICES, claims=(0, 0)), palette=COLOURS, size=(0, 0)),
        ),
        bad(
            "gif-too-few-pixels",
            gif(gif_frame(INDICES, claims=(64, 64)), palette=COLOURS, size=(64, 64)),
        ),
        bad(
            "gif-code-size-13",
            gif(frame.replace(b"\7\xff\x80", b"\x0d\xff\x80", 1), palette=COLOURS),
        ),
        bad(
            "gif-without-pixels",
            gif(b"," + struct.pack("<HHHHB", 0, 0, *SIZE, 0) + b"\7\0", palette=COLOURS),
        ),
        bad("gif-second-frame-cut-off", gif(frame, b",\0\0\0", palette=COLOURS, end=b"")),
    ]
