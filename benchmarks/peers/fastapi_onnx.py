"""FastAPI and ONNX Runtime; run by `uvicorn fastapi_onnx:app`.

The upload as in https://fastapi.tiangolo.com/tutorial/request-files/. The function is a plain
`def`, as https://fastapi.tiangolo.com/async/ advises for computation: FastAPI runs it on a thread.
The session as in https://onnxruntime.ai/docs/api/python/tutorial.html.
"""

from typing import Any

from fastapi import FastAPI, UploadFile
from network import Network
from PIL import Image

network = Network()
app = FastAPI()


@app.post("/predict")
def predict(file: UploadFile) -> dict[str, Any]:
    """One photo -> the five best classes."""
    return network([network.pixels(Image.open(file.file))])[0]
