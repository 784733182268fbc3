"""A real inference server, when one is given: llama.cpp's, vLLM's, Ollama's, any OpenAI endpoint.

Set SBS_EDGE_TEST_TEACHER_URL (up to and including /v1) and, if it matters, SBS_EDGE_TEST_TEACHER_MODEL.
The model may be a random one: what is tested is the protocol, not the answers.
"""

from __future__ import annotations

import os

import pytest

from sbs_edge.teacher.annotate import Settings, annotate
from sbs_edge.teacher.calls import Sampling
from sbs_edge.teacher.openai_api import OpenAITeacher
from sbs_edge.teacher.presets import PRESETS

URL = os.environ.get("SBS_EDGE_TEST_TEACHER_URL")
MODEL = os.environ.get("SBS_EDGE_TEST_TEACHER_MODEL", "any")

pytestmark = pytest.mark.skipif(not URL, reason="SBS_EDGE_TEST_TEACHER_URL names no server")


@pytest.mark.parametrize("form", ["chat", "completion"])
def test_a_real_server_is_asked_once_a_row(form, desk, tmp_path):
    task = PRESETS["hvac"].model_copy(update={"form": form})
    settings = Settings(MODEL, Sampling(max_tokens=16, seed=1), concurrency=2)
    runs = [
        annotate(desk.train[:8], task, OpenAITeacher(MODEL, URL), tmp_path / "j.jsonl", settings)
        for _ in range(2)
    ]
    assert runs[0].stats.attempts == 8
    assert runs[1].stats.attempts == 0
    assert [r.texts for r in runs[0].results] == [r.texts for r in runs[1].results]
    for record in runs[0].records:
        assert record.error is None
        assert record.finish_reason in ("stop", "length")
        assert record.prompt_tokens > 50
        assert 0 <= record.completion_tokens <= 16


def test_a_prompt_beyond_the_context_is_kept_as_rejected(desk, tmp_path):
    import dataclasses

    row = dataclasses.replace(desk.train[0], input="cold " * 20_000)
    settings = Settings(MODEL, Sampling(max_tokens=16))
    result = annotate([row], PRESETS["hvac"], OpenAITeacher(MODEL, URL), tmp_path / "j.jsonl", settings)
    assert result.results[0].reason == "rejected"
    assert result.stats.attempts == 1
