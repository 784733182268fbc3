"""A protocol-true teacher on localhost: chat and plain completions, usage, limits, faults, a log of calls.

It is a real HTTP server (uvicorn) in a thread of the test process, asked through the real ``openai``
client, mostly from another process; what it answers comes from the built-in task's programmatic teacher.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from sbs_edge.cli.app import main
from sbs_edge.data.builtin import builtin_splits
from sbs_edge.teacher.presets import PRESETS

sys.path.insert(0, str(Path(__file__).parent))

from scripted import TASK, Scripted


@dataclass
class FakeTeacher:
    """The server's behaviour; tests change it while it runs."""

    answers: dict[str, str]
    latency_seconds: float = 0.0
    fail_first: int = 0  # this many calls get a 500
    status_for: dict[str, int] = field(default_factory=dict)  # input -> status
    window: tuple[int, float] | None = None  # (requests, seconds) allowed
    announce_limits: bool = True
    finish_reason: str = "stop"
    usage: bool = True
    label_probs: dict[str, float] = field(default_factory=dict)  # sent at the label, where asked for
    calls: list[tuple[float, str, int]] = field(default_factory=list)  # (time, prompt, status)
    bodies: list[dict] = field(default_factory=list)
    most_at_once: int = 0
    url: str = ""
    _at_once: int = 0
    _window_start: float = 0.0
    _window_used: int = 0

    def finished(self) -> Counter:
        return Counter(prompt for _, prompt, status in self.calls if status == 200)

    def statuses(self) -> Counter:
        return Counter(status for *_, status in self.calls)

    def answer(self, prompt: str, n_calls: int) -> str:
        text = self.answers.get(prompt)
        return text if text is not None else "I'm sorry, I cannot help with that."


def build_app(teacher: FakeTeacher):
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    def limits(now: float) -> tuple[bool, dict[str, str]]:
        if teacher.window is None:
            return True, {}
        allowed, seconds = teacher.window
        if now - teacher._window_start >= seconds:
            teacher._window_start, teacher._window_used = now, 0
        admitted = teacher._window_used < allowed
        teacher._window_used += admitted
        rest = seconds - (now - teacher._window_start)
        headers = {
            "x-ratelimit-limit-requests": str(allowed),
            "x-ratelimit-remaining-requests": str(allowed - teacher._window_used),
            "x-ratelimit-reset-requests": f"{int(rest * 1000) + 1}ms",
        }
        return admitted, headers if teacher.announce_limits else {}

    def error(status: int, prompt: str, code: str, headers: dict[str, str]) -> JSONResponse:
        teacher.calls.append((time.monotonic(), prompt, status))
        body = {
            "error": {"message": f"made to fail with {status}", "type": code, "param": None, "code": code}
        }
        return JSONResponse(body, status_code=status, headers=headers)

    async def complete(request):
        body = await request.json()
        teacher.bodies.append(body)
        is_chat = "messages" in body
        if is_chat:
            prompt = body["messages"][-1]["content"]
            n_chars = sum(len(message["content"]) for message in body["messages"])
        else:
            prompt = body["prompt"].rsplit("Q: ", 1)[-1].removesuffix("\nA:")
            n_chars = len(body["prompt"])
        teacher._at_once += 1
        teacher.most_at_once = max(teacher.most_at_once, teacher._at_once)
        try:
            await asyncio.sleep(teacher.latency_seconds)
        finally:
            teacher._at_once -= 1
        admitted, headers = limits(time.monotonic())
        if not admitted:
            wait = headers.get("x-ratelimit-reset-requests", "200ms").removesuffix("ms")
            return error(429, prompt, "rate_limit_exceeded", {**headers, "retry-after": str(int(wait) / 1e3)})
        if len(teacher.calls) < teacher.fail_first:
            return error(500, prompt, "server_error", headers)
        if prompt in teacher.status_for:
            return error(teacher.status_for[prompt], prompt, "made_up", headers)
        text = teacher.answer(prompt, len(teacher.calls))
        teacher.calls.append((time.monotonic(), prompt, 200))
        choice = {"index": 0, "finish_reason": teacher.finish_reason, "logprobs": None}
        if body.get("logprobs") and teacher.label_probs:
            choice["logprobs"] = logprobs_of(text, teacher.label_probs, is_chat)
        if is_chat:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = f" {text}\n\nQ: what else ?\nA: Nothing."
        content = {
            "id": "cmpl-1",
            "object": "chat.completion" if is_chat else "text_completion",
            "created": int(time.time()),
            "model": body["model"],
            "choices": [choice],
        }
        if teacher.usage:
            asked, written = n_chars // 4, len(text) // 4
            content["usage"] = {
                "prompt_tokens": asked,
                "completion_tokens": written,
                "total_tokens": asked + written,
            }
        # ASCII: a lone surrogate in a text goes out as the escape that a real server would send.
        return Response(json.dumps(content), media_type="application/json", headers=headers)

    return Starlette(
        routes=[
            Route("/v1/chat/completions", complete, methods=["POST"]),
            Route("/v1/completions", complete, methods=["POST"]),
        ]
    )


def logprobs_of(text: str, label_probs: dict[str, float], is_chat: bool) -> dict:
    """Log-probabilities in the layout of either route; all tokens but the label are certain."""
    tokens = re.findall(r"\s*\w+|\s*\W", text)
    tables = [{token: 0.0} for token in tokens]
    place = max(i for i, token in enumerate(tokens) if token.strip() in label_probs)
    tables[place] = {f" {label}": math.log(p) for label, p in label_probs.items()}
    if not is_chat:
        chosen = [table.get(token, -1e9) for token, table in zip(tokens, tables, strict=True)]
        return {"tokens": tokens, "token_logprobs": chosen, "top_logprobs": tables, "text_offset": []}
    content = [
        {
            "token": token,
            "logprob": table.get(token, -9999.0),
            "bytes": None,
            "top_logprobs": [{"token": t, "logprob": p, "bytes": None} for t, p in table.items()],
        }
        for token, table in zip(tokens, tables, strict=True)
    ]
    return {"content": content, "refusal": None}


def answers_of(rows) -> dict[str, str]:
    """The built-in teacher's answers, worded as the preset asks for them."""
    marker = PRESETS["hvac"].answer_marker
    return {row.input: f"{row.rationale} {marker} {row.teacher_label}." for row in rows}


@pytest.fixture(scope="session")
def desk_answers():
    return answers_of


@pytest.fixture(scope="session")
def desk():
    """The built-in task with a teacher that is wrong in a quarter of the rows."""
    return builtin_splits("ci", teacher_error=0.25, n_train=200)


@pytest.fixture
def http_teacher(desk):
    import uvicorn

    teacher = FakeTeacher(answers_of([*desk.train, *desk.validation, *desk.test]))
    config = uvicorn.Config(build_app(teacher), host="127.0.0.1", port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < deadline, "the server did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    teacher.url = f"http://127.0.0.1:{port}/v1"
    yield teacher
    server.should_exit = True
    thread.join(10)


@pytest.fixture
def raw_rows(desk, tmp_path):
    """Inputs only: no label of any kind leaves the test."""

    def write(rows, name="raw.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps({"id": r.id, "input": r.input}) + "\n" for r in rows))
        return path

    return write


@pytest.fixture
def scripted():
    server = Scripted()
    yield server
    server.server.shutdown()
    server.server.server_close()


@pytest.fixture
def annotate(scripted, tmp_path, capsys, monkeypatch):
    """Run ``annotate`` on ``n`` rows; return exit code, what was said, and the rows of OUT."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.delenv("SBS_EDGE_DEBUG", raising=False)

    def run(*flags, n=6, task=None, url=None):
        (tmp_path / "task.yaml").write_text(yaml.safe_dump({**TASK, **(task or {})}))
        (tmp_path / "rows.jsonl").write_text(
            "".join(json.dumps({"input": f"message {i}"}) + "\n" for i in range(n))
        )
        out = tmp_path / "out.jsonl"
        before = len(scripted.requests)
        files = [
            "annotate",
            str(tmp_path / "rows.jsonl"),
            "--task",
            str(tmp_path / "task.yaml"),
            "--out",
            str(out),
        ]
        code = main(
            [*files, "--model", "m", "--base-url", url or scripted.url, "--max-attempts", "2", *flags]
        )
        rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        run.sent = len(scripted.requests) - before
        return code, " ".join(capsys.readouterr().err.split()), rows

    return run
