"""An engine behind HTTP: images in as a ``.npy`` file, classes out as JSON. torch is neither needed nor imported.

optpass optimize fashion-vit --preset balanced --dynamic pixel_values:0=1..32 -o engine
OPTPASS_ENGINE=engine uvicorn --app-dir examples/service app:app
curl --data-binary @images.npy localhost:8000/predict
"""

from __future__ import annotations

import io
import os
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import PlainTextResponse

import optpass

LARGEST = 64 * 2**20
"""Bytes of a request."""


@asynccontextmanager
async def opened(app: FastAPI) -> AsyncIterator[None]:
    """Hold the files against the manifest and warm the engine up before the first request is taken."""
    session = optpass.load(os.environ["OPTPASS_ENGINE"])
    name = session.inputs[0].name
    shape = [
        size if isinstance(size, int) else session.engine.dynamic[size].minimum for size in session.inputs[0].shape
    ]
    session.run(**{name: np.zeros(shape, session.inputs[0].dtype)})
    app.state.session, app.state.input = session, name
    # A session runs one call at a time, on all cores; more calls at once would only wait inside it.
    app.state.worker = ThreadPoolExecutor(max_workers=1)
    yield
    app.state.worker.shutdown()


app = FastAPI(title="optpass engine", lifespan=opened)


@app.get("/health")
def health() -> dict[str, Any]:
    """What is being served, and how it was verified."""
    manifest = app.state.session.manifest
    return {
        "engine": app.state.session.name,
        "source": manifest.source,
        "passes": [f"{record.name} at {', '.join(record.sites)}" for record in manifest.passes],
        "quality": [{"metric": m.name, "dense": m.dense.value, "here": m.optimized.value} for m in manifest.metric],
    }


@app.post("/predict")
async def predict(request: Request) -> dict[str, list[Any]]:
    """The most likely class of each image, and its probability."""
    if int(request.headers.get("content-length", 0)) > LARGEST:
        raise HTTPException(413, f"more than {LARGEST} bytes; send fewer images")
    body = await request.body()
    try:
        images = np.load(io.BytesIO(body), allow_pickle=False)
    except ValueError as error:
        raise HTTPException(422, "the body is no .npy file; write it with numpy.save") from error
    import asyncio

    loop = asyncio.get_running_loop()
    try:
        call = loop.run_in_executor(app.state.worker, lambda: app.state.session.run(**{app.state.input: images}))
        outputs = await call
    except optpass.OptpassError as error:
        raise HTTPException(422, str(error)) from error
    logits = next(iter(outputs.values())).astype(np.float64)
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    return {"classes": shares.argmax(-1).tolist(), "probabilities": shares.max(-1).round(6).tolist()}


@app.get("/metrics", response_class=PlainTextResponse)
def figures() -> str:
    """The latencies recorded when the engine was made, in the text form of Prometheus."""
    lines = ["# TYPE optpass_recorded_latency_ms gauge"]
    for row in app.state.session.manifest.latency:
        if row.engine == app.state.session.name:
            lines.append(f'optpass_recorded_latency_ms{{quantile="0.5"}} {row.optimized.median_ms}')
            lines.append(f'optpass_recorded_latency_ms{{quantile="0.95"}} {row.optimized.p95_ms}')
    return "\n".join(lines) + "\n"
