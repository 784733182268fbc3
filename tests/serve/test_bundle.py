"""Real bundles behind a real server in its own process, judged by clients this project did not write."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from sbs_edge.runtime.student import Student


@pytest.fixture(scope="module")
def student(bundles):
    with Student.load(bundles["closed"]) as loaded:
        yield loaded


@pytest.fixture
def client(server):
    with triton.InferenceServerClient(server.url.removeprefix("http://"), concurrency=4) as opened:
        yield opened


def text_input(texts, binary=True, shape=None):
    tensor = triton.InferInput("text", shape or [len(texts)], "BYTES")
    tensor.set_data_from_numpy(
        np.array([t.encode() for t in texts], dtype=object).reshape(shape or [len(texts)]), binary_data=binary
    )
    return tensor


def strings(result, name):
    return [x.decode() if isinstance(x, bytes) else x for x in result.as_numpy(name).ravel()]


def test_the_real_client_sees_a_server_it_knows(client, bundles):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("desk")
    assert client.is_model_ready("desk", "1")
    assert not client.is_model_ready("other")
    assert client.get_server_metadata()["name"] == "sbs-edge"
    metadata = client.get_model_metadata("desk")
    manifest = json.loads((bundles["closed"] / "manifest.json").read_text())
    assert metadata["parameters"]["labels"] == manifest["labels"]["labels"]
    assert [t["name"] for t in metadata["inputs"]] == ["text"]
    assert [t["name"] for t in client.get_model_metadata("choose")["inputs"]] == ["text", "labels"]


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
@pytest.mark.parametrize("column", [True, False], ids=["column", "row"])
def test_infer_answers_what_the_student_answers_in_process(client, student, texts, binary, column):
    texts = texts[:8]
    shape = [len(texts), 1] if column else None
    names = ["label", "probability", "probabilities", "abstained", "rationale", "rationale_complete"]
    outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in names]
    result = client.infer("desk", [text_input(texts, binary, shape)], outputs=outputs, request_id="r-1")
    want = student.predict(texts)
    assert strings(result, "label") == [p.label for p in want]
    np.testing.assert_allclose(
        result.as_numpy("probability").ravel(), [p.probability for p in want], atol=1e-6
    )
    table = [[p.probabilities[label] for label in student.labels] for p in want]
    np.testing.assert_allclose(result.as_numpy("probabilities"), table, atol=1e-6)
    assert strings(result, "rationale") == [e.rationale for e in student.explain(texts)]
    assert result.get_response()["id"] == "r-1"
    assert result.as_numpy("label").shape == ((8, 1) if column else (8,))


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_infer_without_outputs_and_with_compression(client, student, texts, compression):
    result = client.infer(
        "desk", [text_input(texts[:3])], model_version="1", request_compression_algorithm=compression,
        response_compression_algorithm=compression,
    )  # fmt: skip
    assert strings(result, "label") == [p.label for p in student.predict(texts[:3])]
    assert result.as_numpy("rationale") is None


def test_choices_through_the_real_client(client, bundles, texts):
    labels = [["wait", "close", ""], ["adjust", "dispatch", "wait"]]
    tensor = triton.InferInput("labels", [2, 3], "BYTES")
    tensor.set_data_from_numpy(np.array(labels, dtype=object))
    result = client.infer("choose", [text_input(texts[:2]), tensor])
    with Student.load(bundles["choices"]) as student:
        want = student.predict(texts[:2], labels=[["wait", "close"], labels[1]])
    assert strings(result, "label") == [p.label for p in want]
    with pytest.raises(InferenceServerException, match="send labels"):
        client.infer("choose", [text_input(texts[:2])])


def test_errors_reach_the_real_client_as_messages(client, texts):
    for texts_sent, message in (
        (["a"] * 33, "limit is 32"),
        (["word " * 400], "limit is 128"),
    ):
        with pytest.raises(InferenceServerException, match=message) as caught:
            client.infer("desk", [text_input(texts_sent)])
        assert caught.value.status() == "400"
    with pytest.raises(InferenceServerException, match="no model of that name"):
        client.infer("../etc/passwd".replace("/", "%2F"), [text_input(["a"])])


def test_answers_do_not_depend_on_who_shares_the_batch(server, student, texts):
    """Concurrent requests share batches; each must get what it gets alone in a process of its own."""
    alone = {text: student.predict([text])[0] for text in set(texts)}

    def ask(text):
        answer = httpx.post(f"{server.url}/v1/predict", json={"texts": [text], "model": "desk"}, timeout=30)
        return text, answer.json()["predictions"][0]

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, texts * 4))
    for text, got in answers:
        assert got["label"] == alone[text].label
        assert got["probability"] == pytest.approx(alone[text].probability, abs=1e-6)
    metrics = httpx.get(f"{server.url}/metrics").text
    row = next(
        r
        for r in metrics.splitlines()
        if r.startswith('sbs_edge_batch_size_bucket{le="1.0",model="desk",task="label"')
    )
    count = next(
        r for r in metrics.splitlines() if r.startswith('sbs_edge_batch_size_count{model="desk",task="label"')
    )
    assert float(row.split()[-1]) < float(count.split()[-1])  # some batches held more than one text


def test_schemathesis_finds_no_5xx_on_any_route(server, tmp_path):
    """The OpenAPI document is also judged: status, content type and schema of each answer must fit it."""
    command = [
        "schemathesis", "run", f"{server.url}/openapi.json",
        "--checks", "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
        "--max-examples", "15", "--seed", "1", "--phases", "examples,coverage,fuzzing", "--workers", "1",
        "-H", "X-Request-Timeout-Ms: 30000", "--no-color",
    ]  # fmt: skip
    done = subprocess.run(
        [str(Path(sys.executable).with_name("schemathesis")), *command[1:]],
        capture_output=True, text=True, timeout=400, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    metrics = httpx.get(f"{server.url}/metrics").text
    codes = {
        r.split('code="')[1][:3] for r in metrics.splitlines() if r.startswith("sbs_edge_requests_total{")
    }
    assert "200" in codes
    assert not {code for code in codes if code.startswith("5")}


def test_the_server_process_holds_no_torch():
    code = (
        "import sys, sbs_edge.serve.server, sbs_edge.runtime.student;"
        "sys.exit(bool({'torch', 'transformers', 'onnx'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


def test_a_damaged_bundle_never_gets_ready_and_exits_4(bundles, tmp_path, sbs_edge_cli):
    damaged = tmp_path / "damaged"
    shutil.copytree(bundles["closed"], damaged)
    weights = damaged / "cpu-int8" / "weights.bin"
    raw = bytearray(weights.read_bytes())
    raw[len(raw) // 2] ^= 1
    weights.write_bytes(raw)
    done = sbs_edge_cli("serve", damaged, "--port", "0")
    assert done.returncode == 4, done.stderr
    assert "version_ready" not in done.stderr
    assert done.stdout == ""


def test_usage_errors_are_one_paragraph(bundles, sbs_edge_cli, tmp_path):
    bundle = bundles["closed"]
    for arguments, message in (
        ((bundle, "--tls-cert", "c.pem"), "TLS needs both"),
        ((bundle, "--max-texts", "0"), "--max-texts"),
        ((f"a/b={bundle}",), "is not valid"),
        ((bundle, "--token-file", tmp_path / "none"), "cannot be read"),
    ):
        done = sbs_edge_cli("serve", *arguments)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
    plan = sbs_edge_cli(
        "serve", bundle, "--dry-run", SBS_EDGE_SERVE_MAX_TEXTS="7", SBS_EDGE_SERVE_TOKEN="hush"
    )
    document = json.loads(plan.stdout)
    assert document["max_texts"] == 7
    assert "hush" not in plan.stdout
    assert os.environ.get("SBS_EDGE_SERVE_TOKEN") is None
