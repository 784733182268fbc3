"""docs/serving.md shows answers; a server that runs gives answers of that shape."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "serving.md"


def shape(value: Any, *, free: bool = False) -> Any:
    """Return keys and types; of ``probabilities`` only the types, since its keys are the task's labels."""
    if isinstance(value, dict):
        if free:
            return {"*": sorted({type(each).__name__ for each in value.values()})}
        return {key: shape(each, free=key == "probabilities") for key, each in value.items()}
    if isinstance(value, list):
        return (
            [shape(value[0])] if value and not isinstance(value[0], dict) else [shape(each) for each in value]
        )
    return type(value).__name__


@pytest.fixture(scope="module")
def shown() -> list[dict[str, Any]]:
    blocks = re.findall(r"```json\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.S)
    return [
        json.loads(block)
        for block in blocks
        if "predictions" in block or "outputs" in block or "error" in block
    ]


def test_the_answers_in_the_document_have_the_shape_of_real_ones(server, shown) -> None:
    import httpx

    plain, tensors, refusal = shown
    with httpx.Client(base_url=server.url, timeout=60) as client:
        asked = {"model": "desk", "texts": ["cold air"], "explain": True}
        real = client.post("/v1/predict", json=asked).json()
        text = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["cold air"]}
        infer = client.post("/v2/models/desk/infer", json={"id": "7", "inputs": [text]}).json()
        refused = {
            path: client.request(method, path, content=content)
            for method, path, content in (
                ("POST", "/v1/predict", b"{"),
                ("GET", "/nowhere", None),
                ("DELETE", "/v1/predict", None),
                ("GET", "/v2/models/nobody", None),
            )
        }
    assert shape(real) == shape(plain)
    assert shape(infer) == shape(tensors)
    assert {answer.status_code for answer in refused.values()} <= {400, 404, 405}
    for answer in refused.values():
        assert shape(answer.json()) == shape(refusal)
