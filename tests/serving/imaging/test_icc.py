"""Which colour profiles are given to the colour engine."""

from __future__ import annotations

import struct

import pytest
from PIL import ImageCms

from serving.imaging import icc
from tests.hostile.images import profile_of_shared_elements, profile_with
from tests.robustness import icc_profiles

XYZ = b"XYZ \0\0\0\0" + bytes(12)


def curve(count: int, stated: int | None = None) -> bytes:
    return (
        b"curv\0\0\0\0" + struct.pack(">I", count if stated is None else stated) + bytes(2 * count)
    )


def table(kind: bytes, inputs: int, outputs: int, grid: int, missing: int = 0) -> bytes:
    """A look-up table, `missing` bytes too short."""
    width = 1 if kind == b"mft1" else 2
    entries = b"" if width == 1 else struct.pack(">HH", 2, 2)
    ends = (256 if width == 1 else 2) * (inputs + outputs)
    body = entries + bytes(width * (ends + grid**inputs * outputs))
    head = kind + bytes(4) + bytes([inputs, outputs, grid, 0]) + bytes(36)
    return (head + body)[: len(head + body) - missing]


def pipeline(inputs: int, grid: int, missing: int = 0) -> bytes:
    """A pipeline with a look-up table of 8 bits alone, `missing` bytes too short."""
    head = b"mAB \0\0\0\0" + bytes([inputs, 3, 0, 0]) + struct.pack(">5I", 0, 0, 0, 32, 0)
    body = bytes([grid] * inputs + [0] * (16 - inputs)) + b"\1\0\0\0" + bytes(3 * grid**inputs)
    return (head + body)[: len(head + body) - missing]


@pytest.mark.parametrize("name", ["sRGB", "LAB", "XYZ"])
def test_profiles_of_the_colour_engine_itself_are_safe(name: str) -> None:
    assert icc.is_safe(ImageCms.ImageCmsProfile(ImageCms.createProfile(name)).tobytes())


@pytest.mark.parametrize(
    "profile",
    [
        icc_profiles.rgb(),
        icc_profiles.grey(),
        icc_profiles.cmyk(),
        profile_with({b"A2B0": table(b"mft1", 4, 3, 9)}, b"CMYK"),
        profile_with({b"A2B0": table(b"mft2", 3, 3, 33)}),
        profile_with({b"A2B0": pipeline(3, 17)}),
        profile_with({b"rXYZ": XYZ, b"rTRC": curve(1024), b"desc": b"mluc\0\0\0\0\0\0\1\0"}),
    ],
)
def test_profiles_as_cameras_and_printers_have_them_are_safe(profile: bytes) -> None:
    assert icc.is_safe(profile)


@pytest.mark.parametrize(
    "profile",
    [
        b"",
        b"not a profile",
        bytes(500),
        icc_profiles.rgb()[:200],
        profile_of_shared_elements(10),
        profile_of_shared_elements(20_000),
        profile_with({b"B2D0": XYZ}),
        profile_with({b"A2B0": b"mpet\0\0\0\0" + bytes(40)}),
        profile_with({b"A2B0": curve(10)}),
        profile_with({b"A2B0": table(b"mft1", 4, 3, 9, missing=8)}),
        profile_with({b"A2B0": table(b"mft2", 3, 3, 9, missing=8)}),
        profile_with({b"A2B0": table(b"mft2", 5, 3, 3)}),
        profile_with({b"A2B0": pipeline(3, 9, missing=8)}),
        profile_with({b"A2B0": pipeline(5, 3)}),
        profile_with({b"rTRC": curve(10, stated=60_000)}),
        profile_with({b"desc": b"mluc\0\0\0\0" + struct.pack(">I", 2**20)}),
        profile_with({b"xxx%d" % (i % 10) + bytes([i]): XYZ for i in range(101)}),
        profile_with({b"x": bytes(icc.MAX_BYTES)}),
    ],
)
def test_other_profiles_are_not(profile: bytes) -> None:
    assert not icc.is_safe(profile)


def test_an_element_may_be_shared_by_few_tags() -> None:
    def shared(count: int) -> bytes:
        table = struct.pack(">I", count)
        at = 128 + 4 + 12 * count
        table += b"".join(b"xxx%c" % i + struct.pack(">II", at, len(XYZ)) for i in range(count))
        return profile_with({})[:128] + table + XYZ

    assert icc.is_safe(shared(icc.MAX_SHARED))
    assert not icc.is_safe(shared(icc.MAX_SHARED + 1))
