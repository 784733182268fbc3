"""The teacher's distribution over labels: out of log-probabilities, out of votes, into the rows."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbs_edge.chat.logprobs import KEPT_TOKENS, label_distribution, read_logprobs
from sbs_edge.data.readers import read_examples
from sbs_edge.teacher.annotate import Settings, annotate_outputs
from sbs_edge.teacher.calls import Sampling
from sbs_edge.teacher.collect import row_keys
from sbs_edge.teacher.journal import Record
from sbs_edge.teacher.presets import PRESETS
from sbs_edge.teacher.task import save_task

TASK = PRESETS["hvac"]
PROBS = {"wait": 0.5, "dispatch": 0.3, "adjust": 0.15, "refund": 0.05}


def places(*tokens, **tables):
    return [
        (token, {key: math.log(p) for key, p in tables.get(f"at{i}", {}).items()})
        for i, token in enumerate(tokens)
    ]


@pytest.mark.parametrize(
    ("tokens", "table", "label", "known", "wanted"),
    [
        (
            (" is", " wait", "."),
            {" wait": 0.6, " close": 0.4},
            "wait",
            ["wait", "close"],
            {"wait": 0.6, "close": 0.4},
        ),
        (
            (" is", " **Wait", "**"),
            {" **Wait": 0.6, " **Close": 0.3},
            "wait",
            ["wait", "close"],
            {"wait": 0.6, "close": 0.3},
        ),
        # "re" begins two labels: it counts for the one that was answered, and for none where a third was.
        (
            (" is", " re", "fund"),
            {" re": 0.7, " wait": 0.3},
            "refund",
            ["refund", "reply", "wait"],
            {"refund": 0.7, "wait": 0.3},
        ),
        (
            (" is", " wait", "."),
            {" re": 0.7, " wait": 0.3},
            "wait",
            ["refund", "reply", "wait"],
            {"wait": 0.3},
        ),
        # one label begins another
        ((" is", " no", "."), {" no": 0.7, " none": 0.3}, "no", ["no", "none"], {"no": 0.7, "none": 0.3}),
        # a token that begins no label, and one of white space or a mark alone, is left out
        (
            (" is", " wait", "."),
            {" wait": 0.5, " maybe": 0.3, " ": 0.2},
            "wait",
            ["wait", "close"],
            {"wait": 0.5},
        ),
    ],
)
def test_alternatives_at_the_label_are_its_distribution(tokens, table, label, known, wanted):
    found = label_distribution(places(*tokens, at1=table), label, known)
    assert found == pytest.approx(wanted)


def test_choices_are_read_by_their_letters():
    found = label_distribution(
        places(" is", " (", "b", ")", " chest", at2={"b": 0.6, "a": 0.3, "c": 0.1}),
        "chest",
        ["closet", "chest"],
        lettered=True,
    )
    assert found == pytest.approx({"chest": 0.6, "closet": 0.3})


def test_the_last_place_that_names_the_label_is_taken():
    found = label_distribution(
        places(" wait", " so", " wait", at0={" wait": 1.0}, at2={" wait": 0.6, " close": 0.4}),
        "wait",
        ["wait", "close"],
    )
    assert found == pytest.approx({"wait": 0.6, "close": 0.4})


def test_a_label_that_is_not_in_the_tokens_gives_nothing():
    assert label_distribution(places(" wait"), "close", ["wait", "close"]) == {}
    assert label_distribution((), "close", ["wait", "close"]) == {}
    assert label_distribution(places(" closed", at0={" closed": 1.0}), "close", ["wait", "close"]) == {}


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["content", "tokens", "token", "logprob", "top_logprobs", "token_logprobs"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@given(JUNK)
def test_whatever_a_server_sends_is_read_or_left_out(found):
    for token, table in read_logprobs(found):
        assert isinstance(token, str)
        assert all(math.isfinite(value) and value <= 0 for value in table.values())


def test_only_the_end_of_an_answer_is_kept():
    content = [{"token": f" {i}", "logprob": -0.5, "top_logprobs": []} for i in range(KEPT_TOKENS + 9)]
    kept = read_logprobs({"content": content})
    assert [token for token, _ in kept] == [f" {i}" for i in range(9, KEPT_TOKENS + 9)]


@pytest.mark.parametrize("form", ["chat", "completion"])
def test_log_probabilities_go_from_the_server_into_journal_and_rows(
    http_teacher, desk, raw_rows, tmp_path, form
):
    http_teacher.label_probs = PROBS
    http_teacher.answers = {
        row.input: f"some words here . {TASK.answer_marker} wait." for row in desk.train[:6]
    }
    task, out = tmp_path / "task.yaml", tmp_path / "out.jsonl"
    save_task(TASK.model_copy(update={"form": form}), task)
    data = raw_rows(desk.train[:6])
    call = [
        *(sys.executable, "-m", "sbs_edge", "annotate", str(data), "--task", str(task), "--out", str(out)),
        *("--base-url", http_teacher.url, "--model", "desk", "--logprobs", "5"),
    ]  # fmt: skip
    ran = subprocess.run(call, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    asked = {"logprobs": True, "top_logprobs": 5} if form == "chat" else {"logprobs": 5}
    assert all(body.items() >= asked.items() for body in http_teacher.bodies)
    total = 0.95  # "refund" is not a label of the task
    for row in read_examples(out).examples:
        assert row.teacher_label == "wait"
        wanted = {"wait": 0.5 / total, "dispatch": 0.3 / total, "adjust": 0.15 / total}
        assert dict(row.teacher_probs) == pytest.approx(wanted, abs=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "out.journal.jsonl").read_text().splitlines()]
    answers = [
        line for line in lines if not line["key"].startswith("#")
    ]  # "#structured": what the server takes
    assert all(" refund" in dict(line["top_logprobs"])[" wait"] for line in answers)
    # The journal answers the second run: the same rows, and nothing is asked.
    before, calls = out.read_bytes(), len(http_teacher.calls)
    assert subprocess.run(call, capture_output=True, timeout=120).returncode == 0
    assert out.read_bytes() == before
    assert len(http_teacher.calls) == calls


def test_a_server_without_log_probabilities_is_named(http_teacher, desk, raw_rows, tmp_path):
    call = [
        *(sys.executable, "-m", "sbs_edge", "annotate", str(raw_rows(desk.train[:3])), "--task", "hvac"),
        *(
            "--out",
            str(tmp_path / "o.jsonl"),
            "--base-url",
            http_teacher.url,
            "--model",
            "desk",
            "--logprobs",
            "5",
        ),
    ]
    ran = subprocess.run(call, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert "sent no log-probabilities" in " ".join(ran.stderr.split())


def test_votes_give_a_distribution_and_all_rationales_that_agree(desk):
    row = dataclasses.replace(desk.train[0], teacher_label=None, rationale=None)
    settings = Settings("desk", Sampling(0.7), samples=5)
    texts = [
        "the coil is hot and the room is cold . So the answer is wait.",
        "the room is above its target today . So the answer is close.",
        "the vent is warm and it is needed . So the answer is wait.",
        "the coil is hot and the room is cold . So the answer is wait.",
        "no idea",
    ]
    keys = row_keys(row, TASK, "desk", settings.sampling, 5)
    found = {key: Record(key, text) for key, text in zip(keys, texts, strict=True)}
    (result,) = annotate_outputs([row], TASK, found, settings).results
    assert result.example.teacher_label == "wait"
    assert result.example.teacher_probs == (("wait", 0.75), ("close", 0.25))
    assert result.example.rationales == (
        "the coil is hot and the room is cold .",
        "the vent is warm and it is needed .",
    )
    assert result.example.rationale == result.example.rationales[0]
    assert result.example.confidence == 3 / 5


def test_one_answer_without_log_probabilities_gives_none(desk):
    row = desk.train[0]
    settings = Settings("desk", Sampling())
    (key,) = row_keys(row, TASK, "desk", settings.sampling)
    record = Record(key, "the coil is hot and the room is cold . So the answer is wait.")
    (result,) = annotate_outputs([row], TASK, {key: record}, settings).results
    assert (result.example.teacher_probs, result.example.rationales) == ((), ())
