"""LitServe and ONNX Runtime; run by `python litserve_onnx.py PORT`, settings in PEER_* variables.

The four methods as in https://lightning.ai/docs/litserve/api-reference/litapi, batching as in
https://lightning.ai/docs/litserve/features/batching, workers and the fast queue as in
https://lightning.ai/docs/litserve/api-reference/litserver. A photo is a field of a multipart form,
which LitServe passes to `decode_request`.
"""

import os
import sys
from typing import Any

import litserve as ls
import numpy as np
import numpy.typing as npt
from fastapi import Request
from network import Network
from PIL import Image

BATCH = int(os.environ.get("PEER_BATCH", "1"))


class ImageClassifier(ls.LitAPI):
    """Decodes and predicts in the worker."""

    def setup(self, device: str) -> None:
        """Load the network; called once per worker."""
        self.network = Network()

    def decode_request(self, request: Request) -> npt.NDArray[np.uint8]:
        """The form's photo as uint8 [size, size, 3]."""
        return self.network.pixels(Image.open(request["image"].file))

    def predict(self, x: npt.NDArray[np.uint8]) -> Any:
        """Answer one image, or a batch of images if batching is on."""
        return self.network(x) if BATCH > 1 else self.network([x])[0]

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        """Return the output unchanged."""
        return output


if __name__ == "__main__":
    api = ImageClassifier(
        max_batch_size=BATCH, batch_timeout=float(os.environ.get("PEER_WAIT", "0"))
    )
    server = ls.LitServer(
        api,
        accelerator="cpu",
        workers_per_device=int(os.environ.get("PEER_WORKERS", "1")),
        fast_queue=bool(os.environ.get("PEER_FAST_QUEUE")),
    )
    servers = int(os.environ.get("PEER_SERVERS", "0")) or None
    server.run(
        host="127.0.0.1", port=int(sys.argv[1]), num_api_servers=servers, generate_client_file=False
    )
