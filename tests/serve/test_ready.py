"""Ready means warm: every graph a request can need is open, and has run, before the first request."""

from __future__ import annotations

import asyncio

import pytest

from sbs_edge.serve.inference_request import InferenceRequest, Timing
from sbs_edge.serve.server import create_service
from sbs_edge.serve.settings import ServeSettings


@pytest.mark.parametrize("kind", ["closed", "choices"])
@pytest.mark.anyio
async def test_no_session_is_opened_after_readiness(bundles, texts, monkeypatch, kind):
    import onnxruntime

    opened, ran = [], []

    class Counting(onnxruntime.InferenceSession):
        def __init__(self, *args, **kwargs):
            opened.append(self)
            super().__init__(*args, **kwargs)

        def run(self, *args, **kwargs):
            ran.append(self)
            return super().run(*args, **kwargs)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Counting)

    service = create_service([("m", bundles[kind])], ServeSettings(threads=1))
    loading = asyncio.create_task(service.registry.refresh(first=True))
    while not loading.done():
        if service.registry.ready:
            break
        assert not service.ready
        await asyncio.sleep(0)
    await loading
    service.started = True
    assert service.ready
    before = len(opened)
    assert before >= 2  # one for labels, one for rationales
    assert set(ran) == set(opened)  # each has run: warm, not merely open
    labels = [["wait", "close"]] * 4 if kind == "choices" else None
    version = service.registry.find("m")
    answers = await service.answer(
        version, InferenceRequest(texts[:4], labels=labels, explain=True), Timing()
    )
    assert all(a["label"] and a["rationale"] is not None for a in answers)
    assert len(opened) == before
    await service.close()
