"""`fledge verify`: repeat the gate here, from the golden images alone, without torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from serving.bundle import storage
from serving.inference.load import open_predictor


def verify(folder: Path, device: str = "cpu") -> list[str]:
    """Check every byte, and the golden images at each precision; one line about each.

    Raises:
        BundleError: A file was changed, or an answer is outside its tolerance here.
        OptionError: The device is not there.
    """
    opened = storage.read(folder)
    name = f"{opened.manifest.name}:{opened.manifest.version}"
    lines = [f"{folder}: {name}, {len(opened.manifest.files)} files are as exported"]
    lines += [f"signed by {signer}{opened.signature_warning}" for signer in opened.signers] or [
        "not signed"
    ]
    for precision, entry in opened.manifest.precisions.items():
        predictor = open_predictor(folder, device=device, precision=precision)  # checks them all
        worst = 0.0
        for item in opened.manifest.golden:
            prepared = predictor.prepare((opened.payload / str(item["file"])).read_bytes())
            answer = predictor.predict([prepared])[0].probabilities
            off = np.abs(answer - np.asarray(item["probabilities"][precision])).max()
            worst = max(worst, float(off))
        lines.append(
            f"{precision} on {predictor.runtime.provider}: {len(opened.manifest.golden)} golden "
            f"images, largest difference {worst:.1e}, tolerance {float(entry['tolerance']):.1e}"
        )
    return lines
