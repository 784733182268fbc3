"""Task files: round trip, prompts, and errors that name the field."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml

from sbs_edge.data.example import Example
from sbs_edge.errors import DataError
from sbs_edge.teacher.calls import Sampling
from sbs_edge.teacher.collect import row_keys
from sbs_edge.teacher.connect import Server, with_request
from sbs_edge.teacher.new_task import PLACEHOLDER, task_from_examples
from sbs_edge.teacher.parse import check_quality, parse_answer
from sbs_edge.teacher.presets import PRESETS, load_task
from sbs_edge.teacher.prompt import render, show
from sbs_edge.teacher.task import read_task, save_task


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_the_file(name, tmp_path):
    save_task(PRESETS[name], tmp_path / "task.yaml")
    assert load_task(tmp_path / "task.yaml") == PRESETS[name] == load_task(name)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("form", ["chat", "completion"])
def test_the_worked_examples_are_read_by_the_parser_and_pass_the_filters(name, form):
    """Every worked example, written as the prompt shows it, is a good answer to the whole parser."""
    task = PRESETS[name].model_copy(update={"form": form})
    prompt = render(task, Example("x", "THE INPUT", choices=task.shots[0].choices))
    answers = (
        [text for role, text in prompt.messages if role == "assistant"]
        if form == "chat"
        else [part.split(f"\n{task.output_marker} ")[1] for part in prompt.text.split("\n\n")[1:-1]]
    )
    assert len(answers) == len(task.shots)
    for shot, answer in zip(task.shots, answers, strict=True):
        parsed = parse_answer(task, answer, shot.choices, "stop")
        assert (parsed.label, parsed.rationale, parsed.reason) == (shot.label, shot.rationale, None)
        assert check_quality(task, parsed, shot.choices) is None


def test_the_gold_label_changes_neither_prompt_nor_key():
    task = PRESETS["anli1"]
    rows = [Example("1", "premise: a\nhypothesis: b", label=label) for label in (None, *task.labels)]
    assert len({show(render(task, row)) for row in rows}) == 1
    assert len({row_keys(row, task, "m", Sampling())[0] for row in rows}) == 1


@pytest.mark.parametrize("form", ["chat", "completion"])
def test_a_row_is_not_its_own_worked_example(form):
    rows = [Example(str(i), f"case {i}", label="ab"[i % 2], rationale=f"since {i}") for i in range(4)]
    task = task_from_examples("t", rows, 2).model_copy(update={"form": form})
    assert [shot.input for shot in task.shots] == ["case 0", "case 1"]
    for number, row in enumerate(rows):
        shown = show(render(task, row))
        assert shown.count(f"case {number}") == 1
        assert f"since {number}" not in shown
        assert [f"since {i}" in shown for i in (0, 1)] == [number != 0, number != 1]
    spelled = show(render(task, Example("x", "  CASE  0")))
    assert "since 0" not in spelled
    alone = show(render(task.model_copy(update={"shots": task.shots[:1]}), rows[0]))
    assert "The label is one of: a, b." in alone


def test_choices_are_lettered_once():
    row = Example("1", "Where?", choices=("here", "there"))
    listed = Example("1", "Where?\nAnswer Choices:\n(a) here\n(b) there", choices=("here", "there"))
    assert render(PRESETS["cqa"], row) == render(PRESETS["cqa"], listed)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"labels": []}, "label_kind"),
        ({"labels": ["a", "A "]}, "labels"),
        ({"parser": "choice"}, "choices"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"shotss": []}, "shotss"),
        ({"filters": {"leek": True}}, "filters.leek"),
        ({"shots": [{"input": "x", "rationale": "y", "label": "perhaps"}]}, "shot 1"),
        ({"shots": [{"input": "x", "rationale": "so the answer is y", "label": "wait"}]}, "marker"),
    ],
)
def test_a_wrong_field_is_named(change, named, tmp_path):
    content = PRESETS["hvac"].model_dump(mode="json", exclude_none=True) | change
    path = tmp_path / "task.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(DataError, match=named) as caught:
        load_task(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "kind", "parser"),
    [
        ([("a", "yes"), ("b", "no"), ("c", "yes"), ("d", "no")], "closed", "label"),
        ([("a", "( 3 + 4 )"), ("b", "( 1 / 2 )")], "open", "expression"),
        ([("a", "Paris"), ("b", "Rome"), ("c", "Oslo")], "open", "label"),
    ],
)
def test_the_shape_is_guessed_from_the_data(rows, kind, parser):
    examples = [Example(str(i), text, label=label) for i, (text, label) in enumerate(rows)]
    task = task_from_examples("t", examples, 2)
    assert (task.label_kind, task.parser) == (kind, parser)
    assert {shot.rationale for shot in task.shots} == {PLACEHOLDER}


def test_task_new_then_show_prompt_on_the_command_line(tmp_path):
    data = tmp_path / "rows.csv"
    data.write_text('text,label\n"the tap drips",plumber\n"no light",electrician\n"wet wall",plumber\n'
                    '"fuse blown",electrician\n')  # fmt: skip
    base = [sys.executable, "-m", "sbs_edge"]
    out = tmp_path / "task.yaml"
    new = [*base, "task", "new", str(data), "--column", "input=text", "--out", str(out), "--shots", "2"]
    subprocess.run(new, check=True, capture_output=True)
    again = subprocess.run(new, capture_output=True, text=True)
    assert again.returncode == 2
    assert "--force" in again.stderr
    assert load_task(out).labels == ("electrician", "plumber")
    shown = subprocess.run(
        [*base, "annotate", str(data), "--column", "input=text", "--task", str(out), "--show-prompt", "--row", "2"],
        check=True,
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert shown.stdout.rstrip().endswith("[user]\nwet wall")
    for asks in (["annotate", str(data), "--column", "input=text", "--task", str(out), "--dry-run"],
                 ["task", "check", str(out)]):  # fmt: skip
        refused = subprocess.run([*base, *asks], capture_output=True, text=True)
        assert refused.returncode == 2
        said = " ".join(refused.stderr.split())
        assert f"{out} is not finished: instruction, shots.0.rationale, shots.1.rationale" in said
    out.write_text(out.read_text().replace("REPLACE THIS: say", "what I say"))
    estimate = subprocess.run(
        [*base, "annotate", str(data), "--column", "input=text", "--task", str(out), "--dry-run"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert "cost unknown without --price-in" in " ".join(estimate.stderr.split())
    checked = subprocess.run([*base, "task", "check", str(out), "--json"], check=True, capture_output=True)
    assert json.loads(checked.stdout)["name"] == "rows"


def test_only_parameters_that_change_answers_count_for_a_ray_folder():
    plain = Sampling(max_tokens=9, extra={"top_k": 4})
    served = Sampling(
        max_tokens=9, limit_name="max_completion_tokens", extra={"top_k": 4, "user": "x", "api_key": "k"}
    )
    assert plain.answer_parameters() == served.answer_parameters() == {
        "temperature": 0.0, "max_tokens": 9, "top_k": 4,
    }  # fmt: skip
    assert Sampling(max_tokens=9, extra={"top_k": 5}).answer_parameters() != plain.answer_parameters()


def test_fields_of_the_request_keep_their_types(tmp_path):
    """A server refuses the text "4" where it expects a number; labels stay text."""
    path = tmp_path / "task.yaml"
    path.write_text(
        "name: x\ninstruction: say it\nlabel_kind: closed\nlabels: [no, 1, 2024-01-01]\n"
        "request: {max_completion_tokens: 512, seed: null}\n"
        "extra_body: {top_k: 4, min_p: 0.5, stream: false, word: '4', day: 2024-01-01, deep: {a: [1, true]}}\n"
    )
    task = read_task(path)
    assert task.labels == ("no", "1", "2024-01-01")
    assert task.request == {"max_completion_tokens": 512, "seed": None}
    assert json.dumps(task.extra_body) == (
        '{"top_k": 4, "min_p": 0.5, "stream": false, "word": "4", "day": "2024-01-01", "deep": {"a": [1, true]}}'
    )
    sampling = with_request(Sampling(), task, Server())
    assert (sampling.limit_name, sampling.max_tokens) == ("max_completion_tokens", 512)
    save_task(task, path)
    assert read_task(path) == task
