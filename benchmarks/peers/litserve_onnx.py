"""LitServe and ONNX Runtime; run by `python litserve_onnx.py PORT`, settings in PEER_* variables.

The four steps as https://lightning.ai/docs/litserve/api-reference/litapi has them, batching as
https://lightning.ai/docs/litserve/features/batching, workers and the fast queue as
https://lightning.ai/docs/litserve/api-reference/litserver. A photo comes as a field of a multipart
form, which LitServe hands on as it is.
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
    """Decodes and answers in the worker."""

    def setup(self, device: str) -> None:
        """Once a worker."""
        self.network = Network()

    def decode_request(self, request: Request) -> npt.NDArray[np.uint8]:
        """A form -> the square that the graph takes."""
        return self.network.pixels(Image.open(request["image"].file))

    def predict(self, x: npt.NDArray[np.uint8]) -> Any:
        """One square, or a stack of them where batches are made."""
        return self.network(x) if BATCH > 1 else self.network([x])[0]

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        """As it is."""
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
