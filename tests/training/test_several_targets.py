"""Rows with several targets, soft labels and rationales, against explicit distributions in float64."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from sbs_edge.data.example import Example
from sbs_edge.data.rationales import best_rationale
from sbs_edge.data.targets import soft_label
from sbs_edge.data.tokenizer import build_tokenizer
from sbs_edge.errors import UsageError
from sbs_edge.training.batches import Collator, Encoded, Encoder, MemoryRows, StreamRows
from sbs_edge.training.config import PREFIXES, TrainConfig, make_config
from sbs_edge.training.model import TwoTaskModel

SIZE = {
    "vocab_size": 61, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 3,
    "dropout_rate": 0.0, "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
ROWS = [
    Encoded(
        (([5, 6, 7, 1], [9, 1]), ([4, 6, 7, 8, 1], [11, 12, 13, 14, 1])),
        further=((([10, 3, 1], 0.25), ([8, 1], 0.125)), (([15, 1], 0.5),)),
    ),
    Encoded((([5, 8, 1], [10, 3, 1]), None), weight=0.5, further=((([9, 1], 0.5),), ())),
    Encoded((([5, 9, 1], [9, 1]), ([4, 9, 9, 1], [12, 1]))),
]


def build():
    torch.manual_seed(0)
    return T5ForConditionalGeneration(T5Config(**SIZE, tie_word_embeddings=False)).eval()


def expected(student, task):
    """The mean of a task from full logits in float64, one target at a time."""
    loss, factor = torch.zeros((), dtype=torch.float64), 0.0
    for row in ROWS:
        if row.tasks[task] is None:
            continue
        source, first = row.tasks[task]
        shares = [(first, 1 - sum(share for _, share in row.further[task])), *row.further[task]]
        for target, share in shares:
            out = student(input_ids=torch.tensor([source]), labels=torch.tensor([target]))
            loss = loss + row.weight * share * len(target) * out.loss
            factor += row.weight * share * len(target)
    return loss / factor


def test_loss_and_gradients_are_those_of_the_distribution_in_float64():
    student, judge = build().double(), build().double()
    out = TwoTaskModel(student, 3.0).train()(**Collator(pad_id=0, eos_id=1, start_id=0)(ROWS))
    label, rationale = expected(judge, 0), expected(judge, 1)
    torch.testing.assert_close(
        out["losses"].double(), torch.stack([label, rationale]).detach().double(), rtol=2e-6, atol=0
    )
    out["loss"].backward()
    (label + 3.0 * rationale).backward()
    own = dict(student.named_parameters())  # T5 takes its attention in float32 whatever its type
    for name, value in judge.named_parameters():
        torch.testing.assert_close(own[name].grad, value.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert out["counts"].tolist() == [7, 7]  # tokens of first targets


def test_one_launch_of_the_loss_whatever_the_number_of_targets():
    launches = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "fused_linear_cross_entropy" in str(func):
                launches.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        TwoTaskModel(build(), 3.0)(**Collator(pad_id=0, eos_id=1, start_id=0)(ROWS))
    assert len(launches) == 1


def test_row_losses_are_those_of_each_row_alone():
    student = build()
    rows = [Encoded((None, row.tasks[1])) for row in ROWS if row.tasks[1] is not None]
    batch = Collator(pad_id=0, eos_id=1, start_id=0)(rows)
    with torch.no_grad():
        found = TwoTaskModel(student, 3.0)(**batch, row_losses=True)["row_losses"]
        wanted = [
            student(input_ids=torch.tensor([row.tasks[1][0]]), labels=torch.tensor([row.tasks[1][1]])).loss
            for row in rows
        ]
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-5, atol=1e-6)


def test_equal_shares_of_one_target_are_that_target():
    plain = Encoded(ROWS[0].tasks)
    twice = Encoded(plain.tasks, further=((([9, 1], 0.3),), (([11, 12, 13, 14, 1], 0.5),)))
    collate, model = Collator(pad_id=0, eos_id=1, start_id=0), TwoTaskModel(build(), 3.0)
    one, two = model(**collate([plain])), model(**collate([twice]))
    torch.testing.assert_close(one["losses"], two["losses"])
    assert one["counts"].tolist() == two["counts"].tolist()
    assert "decoder_rows" not in collate([plain])


# -- which targets -----------------------------------------------------------------------------------


ROW = Example(
    "1", "is it cold", label="a", teacher_label="b", rationale="first words",
    rationales=("first words", "second words", "third words"), teacher_probs=(("a", 0.2), ("b", 0.6), ("z", 0.2)),
)  # fmt: skip


def test_the_distribution_is_cut_to_the_known_labels_before_it_is_normalised():
    assert soft_label(ROW, "b", ["a", "b"], 1.0) == pytest.approx({"b": 0.75, "a": 0.25})
    assert soft_label(ROW, "b", (), 1.0) == pytest.approx({"b": 0.6, "a": 0.2, "z": 0.2})
    assert soft_label(ROW, "b", ["a", "b"], 0.0) == {"b": 1.0}
    assert soft_label(ROW, "b", ["c"], 1.0) == {"b": 1.0}
    roots = {name: math.sqrt(p) for name, p in (("b", 0.6), ("a", 0.2))}
    wanted = {name: root / sum(roots.values()) for name, root in roots.items()}
    assert soft_label(ROW, "b", ["a", "b"], 1.0, temperature=2.0) == pytest.approx(wanted)
    assert soft_label(ROW, "b", ["a", "b"], 0.5) == pytest.approx({"b": 0.875, "a": 0.125})
    assert list(soft_label(ROW, "a", ["a", "b"], 0.5)) == ["a", "b"]  # the hard label leads


def encoder(**fields):
    config = TrainConfig(mode="stepwise-teacher", **fields)
    texts = [ROW.input, *ROW.rationales, "a b z"]
    return Encoder(build_tokenizer(texts, PREFIXES["seed"], "word", 100), config, 1, ["a", "b"])


def test_a_row_is_encoded_with_its_distribution_and_its_rationales():
    encode = encoder(soft_labels=0.5, rationales="all")
    row, words = encode(ROW), lambda ids: encode.texts.decode(ids)
    assert words(row.tasks[0][1]) == "b"
    assert [(words(ids), share) for ids, share in row.further[0]] == [("a", pytest.approx(0.125))]
    assert words(row.tasks[1][1]) == "first words"
    assert [(words(ids), share) for ids, share in row.further[1]] == [
        ("second words", pytest.approx(1 / 3)),
        ("third words", pytest.approx(1 / 3)),
    ]
    plain = encode(ROW, plain=True)
    assert plain.tasks == row.tasks
    assert plain.further == ((), ())


def test_gold_modes_refuse_the_teachers_distribution():
    with pytest.raises(UsageError, match="mode distill or stepwise-teacher"):
        make_config(None, {"mode": "stepwise", "soft_labels": 0.5})


def rationale_of(encode, row):
    return encode.texts.decode(row.tasks[1][1])


def test_an_epoch_draws_one_rationale_whatever_was_read_before():
    encode = encoder()
    rows = MemoryRows([encode(ROW)], 7, sample=True)
    drawn = [rationale_of(encode, row) for row in itertools.islice(rows.starting_at(0), 60)]
    assert set(drawn) == set(ROW.rationales)
    assert all(not row.further[1] for row in itertools.islice(rows.starting_at(0), 5))
    assert drawn[20:] == [rationale_of(encode, row) for row in itertools.islice(rows.starting_at(20), 40)]
    stream = StreamRows(lambda: [ROW], encode, 7, 10)
    read = [rationale_of(encode, encode(row)) for row in itertools.islice(stream.starting_at(0), 60)]
    assert set(read) == set(ROW.rationales)
    assert read[20:] == [
        rationale_of(encode, encode(row)) for row in itertools.islice(stream.starting_at(20), 40)
    ]


@pytest.mark.parametrize("seed", range(3))
def test_the_best_rationale_has_the_shared_evidence(seed):
    good = "the plant heats and the room is cold"
    some = [
        good, "heats plant , cold room , so dispatch", "so we should wait , the room is cold and the plant heats",
        "noise about a photo and a key", "the plant heats and the room is far too cold for anyone",
    ]  # fmt: skip
    random.Random(seed).shuffle(some)
    assert best_rationale(some, "burner is on . hands are numb", "dispatch", ["dispatch", "wait"]) == good


def test_a_rationale_that_copies_the_input_or_names_a_label_comes_last():
    text = "the coil is frosted . the room is too cold"
    assert best_rationale([text, "cold air , and cold is not wanted"], text, "dispatch") != text
    # None is left out for it: a row whose rationales all name the label keeps one.
    assert best_rationale(["dispatch it", "dispatch it now"], text, "dispatch") == "dispatch it"
