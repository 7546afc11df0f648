"""Images: decoding and preprocessing of encoded bytes."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Iterator

from PIL import Image

from serving.errors import FledgeError
from serving.imaging import formats, plugins, tta
from serving.imaging.decode import LargerThanStated, decode, decode_here
from serving.imaging.decode import check as check_head
from serving.imaging.limits import MAX_PIXELS
from serving.imaging.preprocess import Preprocess
from tests.fuzz.target import Target

_FULL = Preprocess(size=16)
_SCALED = Preprocess(size=8, decode="scaled", fit="pad")  # reduces most seeds
_PNG = b"\x89PNG\r\n\x1a\n"


def seeds() -> Iterator[bytes]:
    from tests.robustness import corpus

    for item in corpus.items():
        if len(item.data) <= 6000:
            yield item.data


def check(data: bytes) -> None:
    """Decode at the full size and at a reduced one, which must refuse the same with one code."""
    try:
        _check(data, _FULL)
    except FledgeError as error:
        try:
            decided = _check(data, _SCALED)
        except FledgeError as other:
            if other.code != error.code:
                raise AssertionError(f"full: {error.code}, scaled: {other.code}") from error
        else:
            if decided:
                raise AssertionError(f"full: {error.code}, scaled: decoded") from error
        raise
    _check(data, _SCALED)


def _check(data: bytes, preprocess: Preprocess) -> bool:
    """Decode and cut views; False if that needs a process with limits of its own."""
    stated = check_head(data, MAX_PIXELS, preprocess=preprocess)
    if stated.isolated:
        return False
    try:
        found = decode_here(data, max_pixels=MAX_PIXELS, stated=stated, preprocess=preprocess)
    except LargerThanStated:
        return False
    image, (left, top, right, bottom) = found.image, found.area
    if image.mode != "RGB" or image.width * image.height > stated.pixels:
        raise AssertionError(f"{image.mode}, {image.size}, {stated}")
    if not (0 <= left < right <= image.width and 0 <= top < bottom <= image.height):
        raise AssertionError(f"{found.area} of {image.size}")
    side = preprocess.size
    pixels = preprocess(image, found.area)
    views = tta.render(image, preprocess, tta.views_for(preprocess)[1:3], found.area)
    if pixels.shape != (side, side, 3) or views.shape != (2, side, side, 3):
        raise AssertionError(f"not [{side}, {side}, 3]")
    return True


def check_plugin(data: bytes) -> None:
    """Decode HEIC and JPEG XL as a decoder process does."""
    if formats.optional_format(data) is None:
        return
    check_head(data, _PLUGIN_PIXELS)
    image = decode_here(data, max_pixels=_PLUGIN_PIXELS).image
    if image.mode != "RGB" or image.width * image.height > _PLUGIN_PIXELS:
        raise AssertionError(f"{image.mode}, {image.size}")


_PLUGIN_PIXELS = 1_000_000


def plugin_seeds() -> Iterator[bytes]:
    from tests.robustness import plugin_formats

    for item in plugin_formats.items():
        yield item.data


def mutate(rng: random.Random, data: bytes) -> bytes:
    from tests.robustness.mutate import parts, words

    return rng.choice((parts, parts, words))(rng, data, data)


def repair(data: bytes) -> bytes:
    """Correct the checksums of a PNG's chunks, and the length of a RIFF file."""
    if data.startswith(b"RIFF") and len(data) >= 12:
        return data[:4] + struct.pack("<I", len(data) - 8) + data[8:]
    if not data.startswith(_PNG):
        return data
    out, at = [_PNG], len(_PNG)
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        if at + 12 + length > len(data):
            break
        body = data[at + 4 : at + 8 + length]
        out += [data[at : at + 4], body, struct.pack(">I", zlib.crc32(body))]
        at += 12 + length
    return b"".join(out) + data[at:]


WORDS = (
    *(b"IHDR", b"PLTE", b"IDAT", b"tRNS", b"iCCP", b"eXIf", b"acTL", b"fcTL", b"zTXt", b"iTXt"),
    *(b"IEND", b"\xff\xd8\xff", b"\xff\xda", b"\xff\xc0", b"\xff\xc2", b"\xff\xc4", b"\xff\xdb"),
    *(b"\xff\xe1", b"\xff\xe2", b"Exif\0\0", b"ICC_PROFILE\0", b"Adobe", b"VP8 ", b"VP8L", b"VP8X"),
    *(b"ALPH", b"ANIM", b"ANMF", b"ICCP", b"GIF89a", b"GIF87a", b"NETSCAPE2.0", b"II*\0", b"MM\0*"),
    *(b"BM", b"ftypavif", b"meta", b"iloc", b"iprp", b"ispe", b"av1C", b"acsp", b"mft2", b"mpet"),
)


PLUGIN_WORDS = (
    *(b"ftypheic", b"ftypmif1", b"meta", b"iinf", b"iloc", b"iprp", b"ipco", b"ipma", b"ispe"),
    *(b"hvcC", b"irot", b"imir", b"clap", b"pixi", b"colr", b"prof", b"grid", b"hvc1", b"idat"),
    *(
        b"auxC",
        b"iref",
        b"dimg",
        b"JXL \r\n\x87\n",
        b"jxlc",
        b"jxlp",
        b"jbrd",
        b"brob",
        b"\xff\x0a",
    ),
)


def profile_seeds() -> Iterator[bytes]:
    from tests.robustness import icc_profiles

    yield icc_profiles.rgb()
    yield icc_profiles.rgb(2.2, swapped=True)
    yield icc_profiles.grey(1.8)
    yield icc_profiles.cmyk()


def check_profile(data: bytes) -> None:
    """Decode pictures with `data` as their ICC profile: a PNG in RGB or grey, a JPEG in CMYK."""
    space = data[16:20]
    if space == b"CMYK":
        head = b"\xff\xd8\xff\xe2" + struct.pack(">H", len(data[:65_000]) + 16)
        decode(head + b"ICC_PROFILE\0\1\1" + data[:65_000] + _CMYK_JPEG[2:])
        return
    colour, row = (
        (0, b"\0" + bytes(range(8))) if space == b"GRAY" else (2, b"\0" + bytes(range(24)))
    )
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, colour, 0, 0, 0)),
        (b"iCCP", b"x\0\0" + zlib.compress(data, 1)),
        (b"IDAT", zlib.compress(row * 8, 1)),
        (b"IEND", b""),
    )
    decode(
        _PNG
        + b"".join(
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
            for kind, body in chunks
        )
    )


def _cmyk_jpeg() -> bytes:
    file = io.BytesIO()
    Image.new("CMYK", (8, 8), (10, 200, 30, 40)).save(file, "JPEG")
    return file.getvalue()


_CMYK_JPEG = _cmyk_jpeg()


def mutate_profile(rng: random.Random, data: bytes) -> bytes:
    """Change the table of tags: kinds, offsets and lengths; or the type of a tag's data."""
    if len(data) < 144:
        return data
    out = bytearray(data)
    (count,) = struct.unpack_from(">I", data, 128)
    at = 132 + 12 * rng.randrange(max(1, min(count, (len(data) - 132) // 12)))
    _, offset, length = struct.unpack_from(">4sII", data, at)
    choice = rng.randrange(6)
    if choice == 0:
        out[at : at + 4] = rng.choice(_TAGS)
    elif choice == 1:
        other = 132 + 12 * rng.randrange(max(1, min(count, (len(data) - 132) // 12)))
        out[at + 4 : at + 12] = data[other + 4 : other + 12]
    elif choice == 2:
        struct.pack_into(">I", out, at + 8, rng.choice((0, 8, 12, length // 2, len(data), 2**31)))
    elif choice == 3 and offset + 4 <= len(out):
        out[offset : offset + 4] = rng.choice(_TYPES)
    elif choice == 4 and offset + 12 <= len(out):
        struct.pack_into(">I", out, offset + 8, rng.choice((0, 1, 2, 3, 255, 4096, 65_535, 2**31)))
    else:
        out[12:24] = rng.choice(_CLASSES) + rng.choice(_SPACES) + rng.choice((b"XYZ ", b"Lab "))
    return bytes(out)


def repair_profile(data: bytes) -> bytes:
    """State the true length, and the mark that each profile has."""
    if len(data) < 132:
        return data
    return struct.pack(">I", len(data)) + data[4:36] + b"acsp" + data[40:]


_TAGS = (b"A2B0", b"A2B1", b"B2A0", b"D2B0", b"rTRC", b"kTRC", b"rXYZ", b"chad", b"desc", b"wtpt")
_TYPES = (b"mft1", b"mft2", b"mAB ", b"mBA ", b"curv", b"para", b"mpet", b"XYZ ", b"sf32", b"mluc")
_CLASSES = (b"mntr", b"prtr", b"scnr", b"link", b"abst", b"spac", b"nmcl")
_SPACES = (b"RGB ", b"GRAY", b"CMYK", b"Lab ", b"XYZ ", b"HSV ", b"6CLR")

TARGETS = (
    Target("decode", check, seeds, mutate, repair, words=WORDS),
    Target(
        "plugin",
        check_plugin,
        plugin_seeds,
        mutate,
        prepare=lambda: (
            [plugins.load(head) for head in (b"\0\0\0\0ftypheic", b"\xff\x0a")] and None
        ),
        words=PLUGIN_WORDS,
    ),
    Target(
        "profile",
        check_profile,
        profile_seeds,
        mutate_profile,
        repair_profile,
        words=(*_TAGS, *_TYPES, *_CLASSES, *_SPACES),
    ),
)
