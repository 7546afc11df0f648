"""Estimates of what decoding and cutting views cost, for every `decode` and `fit`."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from serving.imaging import cost
from serving.imaging.preprocess import DECODES, FITS, Preprocess
from serving.utils.malloc import LARGE
from tests.hostile.images import WORST
from tests.robustness.large_photos import PHOTOS
from tests.support.fork_server import ROOT

FORMATS = {name: build for name, build in (WORST | PHOTOS).items() if name != "jpeg-99-scans"}
SIZES = ((2403, 1801), (9000, 120), (121, 9001), (33, 7))
# The size of the square is such that the first is reduced by a half, a quarter and an eighth.
SQUARES = (224, 100, 64)
MEASURE = """
import json, sys
from pathlib import Path
from serving.imaging.decode import decode_here
from serving.imaging.preprocess import Preprocess
from serving.imaging.tta import render, views_for
from serving.utils.malloc import return_large_blocks, trim

def status(field):
    text = Path("/proc/self/status").read_text()
    return int(text.split(field + ":")[1].split()[0]) * 1024

def answer(data, preprocess):
    decoded = decode_here(data, max_pixels=10**8, preprocess=preprocess)
    render(decoded.image, preprocess, views_for(preprocess)[:2], decoded.area)

return_large_blocks()
peaks = []
for path in sys.argv[2:]:
    data = Path(path).read_bytes()
    answer(data, Preprocess())
    for values in json.loads(sys.argv[1]):
        trim()
        Path("/proc/self/clear_refs").write_text("5")
        before = status("VmRSS")
        answer(data, Preprocess.from_dict(values))
        peaks.append(status("VmHWM") - before)
print(json.dumps(peaks))
"""


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_nothing_needs_more_memory_than_is_estimated(tmp_path: Path, size: tuple[int, int]) -> None:
    for name, build in FORMATS.items():
        (tmp_path / name).write_bytes(build(*size))
    ways = [
        Preprocess(side, decode=decode, fit=fit)
        for decode, fit, side in itertools.product(DECODES, FITS, SQUARES)
        if decode == "scaled" or side == SQUARES[0]
    ]
    paths = [str(tmp_path / name) for name in FORMATS]
    given = json.dumps([one.to_dict() for one in ways])
    command = [sys.executable, "-c", MEASURE, given, *paths]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    measured = zip(itertools.product(FORMATS, ways), json.loads(done.stdout), strict=True)
    wrong = {}
    for (name, preprocess), peak in measured:
        estimated = cost.estimate((tmp_path / name).read_bytes(), 2, preprocess)
        assert estimated.pixels >= size[0] * size[1], name
        # Freed blocks of less than `LARGE` may stay on the heap. Codecs of AVIF and others, which
        # run in a process with so much more, need some megabytes for any picture.
        slack = LARGE + 2**20 + (2**25 if estimated.isolated else 0)
        if peak > estimated.bytes + slack:
            wrong[name, preprocess.decode, preprocess.fit, preprocess.size] = (peak, estimated)
    assert wrong == {}
