"""Training on long inputs: gradients of plain back-propagation, a bounded memory, and one way to cut texts everywhere."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sbs_edge.data.example import Example, Splits
from sbs_edge.errors import UsageError
from sbs_edge.training import long
from sbs_edge.training.batches import ChunkCollator, Encoded
from sbs_edge.training.config import TrainConfig, make_config
from sbs_edge.training.evaluate import evaluate
from sbs_edge.training.model import TwoTaskModel, build_student
from sbs_edge.training.student_dir import StudentDir
from sbs_edge.training.train import train
from sbs_edge.windows import Chunk, chunks_of


def _rows() -> list[Encoded]:
    """One document of three chunks, one of a single chunk, one of two without a rationale."""
    documents = [chunks_of(list(range(10, 10 + n)), [3], [1], 16, 0.25) for n in (34, 9, 20)]
    assert [len(chunks) for chunks in documents] == [3, 1, 2]
    return [
        Encoded(((documents[0], [5, 1]), (documents[0], [6, 7, 1]))),
        Encoded(((documents[1], [8, 1]), (documents[1], [9, 1]))),
        Encoded(((documents[2], [5, 1]), None)),
    ]


def _model(dropout: float, **options: Any) -> TwoTaskModel:
    torch.manual_seed(0)
    shape = {"d_model": 16, "d_ff": 32, "n_heads": 2, "n_layers": 2, "n_decoder_layers": 2}
    student = build_student(TrainConfig(**shape, dropout=dropout), 64)
    return TwoTaskModel(student, 2.0, engine="torch", **options).train()


def _gradients(model: TwoTaskModel, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(7)
    loss = model(**batch)["loss"]
    loss.backward()
    return float(loss.detach()), {name: value.grad for name, value in model.named_parameters()}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("drawn", [None, 12])
def test_gradients_are_those_of_plain_back_propagation(
    monkeypatch: pytest.MonkeyPatch, dropout: float, drawn: int | None
) -> None:
    batch = ChunkCollator(pad_id=0, eos_id=1, start_id=0)(_rows())
    monkeypatch.setattr(long, "GROUP_TOKENS", 16)  # one chunk a group
    ours = _model(dropout, drawn_states=drawn)
    plain = copy.deepcopy(ours)
    long.bound_memory(ours.student)
    loss, found = _gradients(ours, batch)
    monkeypatch.setattr(long, "checkpoint", lambda function, *args, use_reentrant: function(*args))
    expected_loss, expected = _gradients(plain, batch)
    assert loss == expected_loss
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        assert torch.allclose(found[name], gradient, rtol=1e-5, atol=1e-6), name


def test_the_loss_is_that_of_joined_states() -> None:
    """Against transformers' own decoder, a document at a time."""
    model = _model(0.0).eval()
    rows = _rows()
    out = model(**ChunkCollator(pad_id=0, eos_id=1, start_id=0)(rows))
    sums, counts = [0.0, 0.0], [0, 0]
    for row in rows:
        for task, pair in enumerate(row.tasks):
            if pair is None:
                continue
            chunks, target = pair
            with torch.no_grad():
                states = torch.cat(
                    [
                        model.student.encoder(torch.tensor([c.ids])).last_hidden_state[:, c.start : c.stop]
                        for c in chunks
                    ],
                    1,
                )
                loss = model.student(encoder_outputs=(states,), labels=torch.tensor([target])).loss
            sums[task] += float(loss) * len(target)
            counts[task] += len(target)
    expected = [total / count for total, count in zip(sums, counts, strict=True)]
    assert out["losses"].tolist() == pytest.approx(expected, rel=1e-4)


def test_short_rows_are_read_as_without_chunks() -> None:
    from sbs_edge.training.batches import Collator

    plain = [Encoded((([3, 10, 11, 1], [5, 1]), ([3, 12, 1], [6, 1]))), Encoded((([3, 1], [8, 1]), None))]
    chunked = [
        Encoded(tuple(p and ([Chunk(p[0], 0, len(p[0]))], p[1]) for p in row.tasks))  # type: ignore[arg-type]
        for row in plain
    ]
    model = _model(0.0)
    ours = model(**ChunkCollator(pad_id=0, eos_id=1, start_id=0)(chunked))
    theirs = model(**Collator(pad_id=0, eos_id=1, start_id=0)(plain))
    assert torch.equal(ours["loss"], theirs["loss"])


def test_states_are_drawn_without_replacement_in_their_order() -> None:
    torch.manual_seed(3)
    index = torch.tensor([list(range(100, 130)), [*range(5), *[-1] * 25]])
    drawn = long.draw_states(index, 8)
    assert drawn.shape == (2, 8)
    assert drawn[0].tolist() == sorted(set(drawn[0].tolist()))
    assert sorted(drawn[1].tolist()) == [-1, -1, -1, 0, 1, 2, 3, 4]
    assert not torch.equal(long.draw_states(index, 8), drawn)
    assert long.draw_states(index, 30) is index
    counts = torch.stack([long.draw_states(index[:1], 15)[0] for _ in range(400)]).flatten().bincount()[100:]
    assert counts.min() > 130  # each is drawn in half of the steps
    assert counts.max() < 270


def _long_splits(count: int = 48) -> Splits:
    """Documents of 3 to 60 words whose label is named by one word, after a header."""
    import random

    from sbs_edge.data.example import TaskSpec

    rng = random.Random(0)
    rows = []
    for number in range(count):
        label = rng.choice(["go", "stay"])
        words = rng.choices(["pump", "valve", "fan", "door"], k=rng.choice([3, 20, 60]))
        words.insert(rng.randrange(len(words) + 1), {"go": "cold", "stay": "hot"}[label])
        text = f"unit {number} | " + " ".join(words)
        rows.append(Example(id=str(number), input=text, label=label, rationale=f"{words[0]} so {label}"))
    third = count // 3
    return Splits(TaskSpec("doors", "closed", ("go", "stay")), rows[third:], rows[:third], rows[:third])


@pytest.mark.parametrize("way", ["full", "random"])
def test_a_run_on_long_inputs_is_exported_and_answers_like_the_student(
    small: dict[str, Any], tmp_path: Path, way: str
) -> None:
    from sbs_edge.export.api import export
    from sbs_edge.runtime.student import Student

    splits = _long_splits()
    result = train(
        splits, tmp_path / "s", max_steps=12, tokenizer="word", max_source_tokens=24, max_long_tokens=64,
        long=way, chunk_header="|", chunk_marker=True, **small,
    )  # fmt: skip
    card = json.loads((tmp_path / "s" / "sbs_edge.json").read_text())
    assert card["long"] == {
        "chunk": 24, "max_tokens": 64, "overlap": 0.25, "header": "|", "marker": True, "top_k": None, "trained": way,
    }  # fmt: skip
    # more than 62 words, prefix and end-of-sequence: the inputs of both tasks are cut
    n_cut = sum(len(row.input.split()) > 62 for row in [*splits.train, *splits.validation])
    assert result.metrics["cut_inputs"] == 2 * n_cut > 0
    report = evaluate(tmp_path / "s", splits.validation, predictions=True)
    exported = export(tmp_path / "s", tmp_path / "b", targets=("cpu-fp32",), long={"max_tokens": 64})
    assert exported.report["pytorch"]["graphs"]["long_label_scorer"]["rows"] == 3
    with Student.load(tmp_path / "b") as student:
        texts = [row.input for row in splits.validation]
        answers, written = student.predict(texts, truncate=True), student.explain(texts, truncate=True)
    assert max(answer.n_chunks for answer in answers) > 2
    assert [answer.label for answer in answers] == [row["label"] for row in report["predictions"]]
    assert [one.rationale for one in written] == [row["rationale"] for row in report["predictions"]]


def test_a_student_reads_long_inputs_no_worse_with_all_words_in_sight(
    small: dict[str, Any], tmp_path: Path
) -> None:
    """The sign may stand anywhere in up to 60 words; a student that reads 24 tokens misses many."""
    splits = _long_splits(240)
    options = {**small, "d_model": 32, "eval_steps": 100, "max_source_tokens": 24, "tokenizer": "word"}
    train(
        splits, tmp_path / "long", mode="finetune", max_steps=100, long="full", max_long_tokens=96, **options
    )
    assert evaluate(tmp_path / "long", splits.test)["label_accuracy"] >= 0.95


def test_settings_that_contradict_are_refused() -> None:
    with pytest.raises(UsageError, match="max_long_tokens 512 must be over max_source_tokens 512"):
        make_config(None, {"long": "full", "max_long_tokens": 512})
    assert TrainConfig().long_settings is None
    assert TrainConfig(long="full", max_source_tokens=64).long_settings.chunk == 64  # type: ignore[union-attr]


def test_a_student_without_long_inputs_says_nothing_of_them(
    splits: Splits, small: dict[str, Any], tmp_path: Path
) -> None:
    train(splits, tmp_path / "s", max_steps=1, **small)
    assert "long" not in json.loads((tmp_path / "s" / "sbs_edge.json").read_text())
    assert StudentDir.load(tmp_path / "s").long is None


def test_a_marker_that_fills_the_chunk_names_the_row(small: dict[str, Any], tmp_path: Path) -> None:
    splits = _long_splits()
    with pytest.raises(UsageError, match=r"The input of \d+ has a beginning of \d+ tokens"):
        train(
            splits, tmp_path / "s", max_steps=1, max_source_tokens=8, max_long_tokens=64, long="full",
            tokenizer="unigram", chunk_marker=True, **small,
        )  # fmt: skip


PEAK = """
import resource, sys, torch
from sbs_edge.windows import chunks_of
from sbs_edge.training import long
from sbs_edge.training.batches import ChunkCollator, Encoded
from sbs_edge.training.config import TrainConfig
from sbs_edge.training.model import TwoTaskModel, build_student
torch.set_num_threads(1)
if sys.argv[2] == "plain":
    long.checkpoint = lambda function, *args, use_reentrant: function(*args)
torch.manual_seed(0)
student = build_student(TrainConfig(d_model=256, d_ff=1024, n_heads=4, n_layers=4, n_decoder_layers=4), 2000)
model = TwoTaskModel(student, 1.0, engine="torch").train()
if sys.argv[2] != "plain":
    long.bound_memory(student)
optimiser = torch.optim.AdamW(model.parameters())
chunks = chunks_of([5 + n % 1900 for n in range(int(sys.argv[1]))], [3], [1], 512, 0.25)
row = Encoded(((chunks, [5, 1]), (chunks, [*range(10, 42), 1])))
for _ in range(1):
    model(**ChunkCollator(pad_id=0, eos_id=1, start_id=0)([row]))["loss"].backward()
    optimiser.step()
    optimiser.zero_grad()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def _peak(tokens: int, way: str) -> int:
    done = subprocess.run(
        [sys.executable, "-P", "-c", PEAK, str(tokens), way], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.long
def test_eight_times_the_tokens_need_hardly_more_memory() -> None:
    most = _peak(8192, "ours")
    assert most < 1.3 * _peak(1024, "ours")
    assert most < _peak(2048, "plain")  # plain back-propagation holds more for a quarter of the tokens


def test_the_command_takes_the_fields(
    tmp_path: Path, sbs_edge_cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    rows = [
        {"id": row.id, "input": row.input, "label": row.label, "rationale": row.rationale}
        for row in _long_splits().train
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = sbs_edge_cli(
        "train", tmp_path / "rows.jsonl", "--out", tmp_path / "s", "--long", "full", "--max-source-tokens", "48",
        "--max-long-tokens", "400", "--max-steps", "2", "--d-model", "16", "--n-heads", "2", "--trackers", "none",
        "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = sbs_edge_cli("evaluate", tmp_path / "s", "--data", tmp_path / "rows.jsonl", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["n"] == 32
