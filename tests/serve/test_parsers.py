"""Hypothesis on the parsers: every body is parsed or refused with a 4xx, never anything else."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tritonclient.http import InferInput, InferRequestedOutput, InferResult
from tritonclient.http._utils import _get_inference_request

from sbs_edge.serve import errors, oip, plain
from sbs_edge.serve.body import deadline_s
from sbs_edge.serve.engine import ModelCard

CARD = ModelCard("m", "1", "closed", ("yes", "no"), 40, 16, "cpu-int8", 0.0)

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
words = st.sampled_from(["text", "labels", "BYTES", "FP32", "label", "rationale", "probabilities"])
shapes = st.lists(st.integers(-1, 5) | st.just(2**40), max_size=3) | values
tensors = st.fixed_dictionaries(
    {"name": words | values, "datatype": st.just("BYTES") | values, "shape": shapes},
    optional={
        "data": st.lists(st.text(max_size=5) | st.lists(st.text(max_size=5), max_size=3), max_size=5)
        | values,
        "parameters": st.dictionaries(
            st.sampled_from(["binary_data_size", "shared_memory_region"]), st.integers(-5, 60) | values
        )
        | values,
    },
)
documents = st.fixed_dictionaries(
    {"inputs": st.lists(tensors, max_size=3) | values},
    optional={
        "id": st.text(max_size=5) | values,
        "parameters": values | st.fixed_dictionaries({"explain": st.booleans() | values}),
        "outputs": st.lists(st.fixed_dictionaries({"name": words | values}), max_size=3) | values,
    },
)


def accepts(parse, *arguments):
    """Return what was parsed, or None where the parser refused; anything else is a failure."""
    try:
        return parse(*arguments)
    except errors.HttpError as refused:
        answer = (refused.status, bool(refused.message))
    assert answer == (400, True)
    return None


@settings(max_examples=400, deadline=None)
@given(document=documents | values, tail=st.binary(max_size=40), cut=st.integers(-3, 3))
def test_structured_noise_in_infer_requests(document, tail, cut):
    head = json.dumps(document).encode()
    accepts(oip.parse_request, head + tail, str(len(head) + cut))
    accepts(oip.parse_request, head, None)
    accepts(plain.parse_predict, head)


@settings(max_examples=300, deadline=None)
@given(body=st.binary(max_size=200), header=st.none() | st.text(max_size=6) | st.integers(0, 250).map(str))
@example(body=b"{}", header="²")
@example(body=b"{}", header="9" * 30)
def test_raw_noise(body, header):
    accepts(oip.parse_request, body, header)
    accepts(plain.parse_predict, body)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=12))
def test_deadline_header(text):
    got = accepts(deadline_s, {"request-timeout": text}, 30.0)
    assert got is None or 0 < got <= 300


@settings(max_examples=100, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1, max_size=5),
    binary=st.booleans(),
    column=st.booleans(),
    answers_binary=st.booleans(),
)
def test_round_trip_with_the_real_client(texts, binary, column, answers_binary):
    """tritonclient writes the request and reads the answer; both without a network."""
    shape = [len(texts), 1] if column else [len(texts)]
    tensor = InferInput("text", shape, "BYTES")
    tensor.set_data_from_numpy(np.array(texts, dtype=object).reshape(shape), binary_data=binary)
    names = ["label", "probability", "abstained", "probabilities", "rationale"]
    outputs = [InferRequestedOutput(name, binary_data=answers_binary) for name in names]
    body, size = _get_inference_request(
        inputs=[tensor], request_id="7", outputs=outputs, sequence_id=0, sequence_start=False,
        sequence_end=False, priority=0, timeout=None, custom_parameters=None,
    )  # fmt: skip
    raw = body if isinstance(body, bytes) else body.encode()
    request = oip.parse_request(raw, None if size is None else str(size))
    assert request.inference.texts == texts
    assert request.id == "7"
    assert request.inference.explain
    answers = [
        {
            "label": t,
            "probability": 0.25,
            "probabilities": {"yes": 0.25, "no": 0.75},
            "abstained": i % 2 == 0,
            "escalated": False,
            "truncated": False,
            "rationale": t,
            "rationale_complete": True,
        }
        for i, t in enumerate(texts)
    ]
    content, headers = oip.encode_response(request, answers, CARD)
    length = headers.get("Inference-Header-Content-Length")
    assert (length is not None) == answers_binary
    result = InferResult.from_response_body(content, header_length=int(length) if length else None)
    got = [x.decode() if isinstance(x, bytes) else x for x in result.as_numpy("label").ravel()]
    assert got == texts
    assert list(result.as_numpy("label").shape) == shape
    assert result.as_numpy("abstained").ravel().tolist() == [answer["abstained"] for answer in answers]
    assert result.as_numpy("probabilities").tolist() == [[0.25, 0.75]] * len(texts)
    assert result.get_response()["id"] == "7"


@pytest.mark.parametrize(
    ("tail", "why"),
    [
        (struct.pack("<I", 4) + b"abc", "cut short"),
        (b"\x01\x00", "cut short"),
        (struct.pack("<I", 2) + b"\xff\xfe", "not UTF-8"),
        (struct.pack("<I", 1) + b"a" + struct.pack("<I", 1) + b"b", "has 2 elements"),
    ],
)
def test_broken_binary_tensors_are_named(tail, why):
    head = json.dumps(
        {
            "inputs": [
                {
                    "name": "text",
                    "datatype": "BYTES",
                    "shape": [1],
                    "parameters": {"binary_data_size": len(tail)},
                }
            ]
        }
    ).encode()
    with pytest.raises(errors.HttpError, match=why):
        oip.parse_request(head + tail, str(len(head)))


def test_choices_take_rows_of_different_length():
    body = {
        "inputs": [
            {"name": "text", "datatype": "BYTES", "shape": [2], "data": ["a", "b"]},
            {
                "name": "labels",
                "datatype": "BYTES",
                "shape": [2, 3],
                "data": [["x", "y", "z"], ["p", "q", ""]],
            },
        ]
    }
    asked = oip.parse_request(json.dumps(body).encode(), None)
    assert asked.inference.labels == [["x", "y", "z"], ["p", "q"]]
    body["inputs"][1] |= {"shape": [2], "data": ["x", "y"]}
    assert oip.parse_request(json.dumps(body).encode(), None).inference.labels == [["x", "y"]] * 2


def infer(**fields):
    text = {"name": "text", "datatype": "BYTES", "shape": [1], "data": ["a"]}
    return json.dumps({"inputs": [text], **fields}).encode()


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        ({"sequence_id": 7}, "Sequences are not supported"),
        ({"sequence_start": True}, "Sequences are not supported"),
        ({"shared_memory_region": "a"}, "Shared memory is not supported"),
        ({"classification": 3}, "classification extension is not supported"),
        ({"max_new_token": 4}, "unknown parameter 'max_new_token'"),
        ({"priority": 1}, "unknown parameter 'priority'"),
        ({"max_new_tokens": 0}, "'max_new_tokens' must be a whole number"),
        ({"max_new_tokens": True}, "'max_new_tokens' must be a whole number"),
        ({"max_new_tokens": 2.5}, "'max_new_tokens' must be a whole number"),
    ],
)
def test_no_parameter_of_a_request_is_passed_over(parameters, says):
    with pytest.raises(errors.HttpError, match=says) as caught:
        oip.parse_request(infer(parameters=parameters), None)
    assert caught.value.status == 400


def test_max_new_tokens_reaches_the_model():
    assert oip.parse_request(infer(parameters={"max_new_tokens": 3}), None).inference.max_new_tokens == 3
    assert oip.parse_request(infer(), None).inference.max_new_tokens is None


@pytest.mark.parametrize("where", ["inputs", "outputs"])
def test_no_parameter_of_a_tensor_is_passed_over(where):
    entry = {"name": "text", "datatype": "BYTES", "shape": [1], "data": ["a"], "parameters": {"binary": True}}
    if where == "outputs":
        entry = {"name": "label", "parameters": {"binary": True}}
    with pytest.raises(errors.HttpError, match="unknown parameter 'binary'"):
        oip.parse_request(infer(**{where: [entry]}), None)


def test_one_list_of_labels_is_looked_at_once_however_many_texts(monkeypatch):
    """A body of many texts and many labels must not cost their product."""
    seen = []
    real = plain.check_labels
    monkeypatch.setattr(plain, "check_labels", lambda rows, n: seen.append((len(rows), n)) or real(rows, n))
    body = json.dumps({"texts": ["a"] * 100_000, "labels": ["x", "y"]}).encode()
    parsed = plain.parse_predict(body)
    assert seen == [(1, 1)]
    assert all(row is parsed.labels[0] for row in parsed.labels)
    assert len(parsed.labels) == 100_000
    tensors = [
        {"name": "text", "datatype": "BYTES", "shape": [50_000], "data": ["a"] * 50_000},
        {"name": "labels", "datatype": "BYTES", "shape": [1, 2], "data": ["x", "y"]},
    ]
    labels = oip.parse_request(json.dumps({"inputs": tensors}).encode(), None).inference.labels
    assert len(labels) == 50_000
    assert all(row is labels[0] for row in labels)


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([str(i) for i in range(257)], "has 257 labels; the limit is 256"),
        (["a", "b" * 1001], "a label of 1001 characters; the limit is 1000"),
    ],
)
def test_labels_of_one_text_are_bounded(labels, says):
    for rows in (labels, [labels]):
        with pytest.raises(errors.HttpError, match=says):
            plain.parse_predict(json.dumps({"texts": ["a"], "labels": rows}).encode())


def test_a_message_quotes_a_long_name_in_part():
    for body in (json.dumps({"texts": ["a"], "x" * 100_000: 1}), json.dumps({"y" * 100_000: 1, "texts": []})):
        with pytest.raises(errors.HttpError) as caught:
            plain.parse_predict(body.encode())
        assert len(caught.value.message) < 1100
