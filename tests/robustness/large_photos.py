"""Photos of any size, one for each way in which they are decoded, converted and turned."""

from __future__ import annotations

import io

from PIL import Image

from tests.hostile.images import Builder, png
from tests.robustness import icc_profiles
from tests.robustness.scene import noise


def photo_like(mode: str, kind: str, turned: bool = False, **options: object) -> Builder:
    """A builder of pictures of many colours."""

    def build(width: int, height: int) -> bytes:
        image = noise(0, (width // 16 + 1, height // 16 + 1))
        file = io.BytesIO()
        exif = Image.Exif()
        if turned:
            exif[0x0112] = 6
        image.resize((width, height)).convert(mode).save(file, kind, exif=exif, **options)
        return file.getvalue()

    return build


def partial_gif(width: int, height: int) -> bytes:
    data = photo_like("P", "GIF")(max(1, width * 3 // 4), max(1, height * 3 // 4))
    return data[:6] + width.to_bytes(2, "little") + height.to_bytes(2, "little") + data[10:]


RGB, CMYK = icc_profiles.rgb(), icc_profiles.cmyk()
PHOTOS: dict[str, Builder] = {
    "jpeg-turned": photo_like("RGB", "JPEG", turned=True),
    "jpeg-turned-profile": photo_like("RGB", "JPEG", turned=True, icc_profile=RGB),
    "jpeg-grey-turned": photo_like("L", "JPEG", turned=True),
    "jpeg-cmyk-profile": photo_like("CMYK", "JPEG", turned=True, icc_profile=CMYK),
    "jpeg-progressive-photo": photo_like("RGB", "JPEG", progressive=True, subsampling=0),
    "mpo": photo_like("RGB", "MPO"),
    "png-turned": photo_like("RGB", "PNG", turned=True, compress_level=1),
    "png-rgba-profile": photo_like("RGBA", "PNG", turned=True, icc_profile=RGB, compress_level=1),
    "png-grey-16-bit": lambda width, height: png(width, height, 16, 0),
    "png-palette": photo_like("P", "PNG", compress_level=1),
    "png-1-bit": photo_like("1", "PNG"),
    "webp-turned-profile": photo_like("RGB", "WEBP", turned=True, icc_profile=RGB, method=0),
    "bmp": photo_like("RGB", "BMP"),
    "tiff-turned": photo_like("RGB", "TIFF", turned=True, compression="tiff_lzw"),
    "tiff-rgba-profile": photo_like("RGBA", "TIFF", turned=True, icc_profile=RGB),
    "tiff-cmyk": photo_like("CMYK", "TIFF", compression="tiff_lzw"),
    "gif-partial": partial_gif,
}
