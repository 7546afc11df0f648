"""FastAPI and eager PyTorch, written as in tutorials; run by `uvicorn fastapi_torch:app`.

The upload and the `async def` as in https://fastapi.tiangolo.com/tutorial/request-files/; decoding,
transforms and prediction as in PyTorch's tutorial on a REST API,
https://docs.pytorch.org/tutorials/intermediate/flask_rest_api_tutorial.html. The network is that of
the run PEER_RUN, with its image size, crop, mean and deviation.
"""

import io
import os
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI, UploadFile
from PIL import Image
from torchvision import transforms

from training.run import checkpoint

model, info = checkpoint.load(Path(os.environ["PEER_RUN"]))
model.eval()
preprocess = transforms.Compose(
    [
        transforms.Resize(round(info.preprocess.size / info.preprocess.crop)),
        transforms.CenterCrop(info.preprocess.size),
        transforms.ToTensor(),
        transforms.Normalize(info.preprocess.mean, info.preprocess.std),
    ]
)
app = FastAPI()


@app.post("/predict")
async def predict(file: UploadFile) -> dict[str, Any]:
    """One photo -> the five best classes."""
    image = Image.open(io.BytesIO(await file.read())).convert("RGB")
    with torch.inference_mode():
        logits = model(preprocess(image).unsqueeze(0))
    probabilities = torch.softmax(logits, dim=1)[0]
    best = probabilities.topk(min(5, len(info.classes)))
    return {
        "predictions": [
            {"label": info.classes[index], "probability": value}
            for value, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
    }
