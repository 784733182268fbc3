"""Against transformers' own loss, over the whole T5 family."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    ByT5Tokenizer,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from sbs_edge.data.tokenizer import byte_tokenizer
from sbs_edge.training.batches import Collator, Encoded
from sbs_edge.training.config import TrainConfig
from sbs_edge.training.model import TwoTaskModel, add_lora, merge_lora

SIZE = {
    "vocab_size": 61, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 3,
    "dropout_rate": 0.0, "decoder_start_token_id": 0,
}  # fmt: skip
# name: (config class, model class, options); FLAN-T5 is T5 v1.1's shape, ByT5 is mT5's untied
FAMILY = {
    "t5": (T5Config, T5ForConditionalGeneration, {}),
    "t5-v1.1": (
        T5Config, T5ForConditionalGeneration, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "mt5": (MT5Config, MT5ForConditionalGeneration, {"tie_word_embeddings": False}),
    "byt5": (
        T5Config, T5ForConditionalGeneration,
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_layers": 3},
    ),
    "umt5": (UMT5Config, UMT5ForConditionalGeneration, {"tie_word_embeddings": False}),
    "mt5-tied": (MT5Config, MT5ForConditionalGeneration, {"tie_word_embeddings": True}),
}  # fmt: skip
ROWS = [
    Encoded((([5, 6, 7, 1], [9, 1]), ([4, 6, 7, 8, 1], [11, 12, 13, 14, 1]))),
    Encoded((([5, 8, 1], [10, 1]), None)),
    Encoded((None, ([4, 9, 9, 1], [12, 1])), weight=0.5),
]


def build(name: str):
    torch.manual_seed(0)
    config, model, options = FAMILY[name]
    return model(config(**{**SIZE, **options})).eval()


def reference(student, rows, task: int, weights: bool):
    """Mean cross-entropy of one task from the model's full logits, one row at a time (no padding)."""
    losses, factors = [], []
    for row in rows:
        if row.tasks[task] is None:
            continue
        source, target = row.tasks[task]
        labels = torch.tensor([target])
        out = student(input_ids=torch.tensor([source]), labels=labels)
        losses.append(out.loss * len(target) * (row.weight if weights else 1))
        factors.append(len(target) * (row.weight if weights else 1))
    return sum(losses) / sum(factors)


@pytest.mark.parametrize("name", FAMILY)
def test_loss_and_gradients_equal_transformers_own(name):
    student, judge = build(name), build(name)
    model = TwoTaskModel(student, 3.0).train()
    batch = Collator(pad_id=0, eos_id=1, start_id=0)(ROWS)
    out = model(**batch)
    label, rationale = (reference(judge, ROWS, task, weights=True) for task in (0, 1))
    wanted = label + 3.0 * rationale
    torch.testing.assert_close(out["losses"], torch.stack([label, rationale]).detach(), rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(out["loss"], wanted, rtol=2e-5, atol=1e-6)
    out["loss"].backward()
    wanted.backward()
    own = dict(student.named_parameters())
    for key, value in judge.named_parameters():
        torch.testing.assert_close(own[key].grad, value.grad, rtol=1e-4, atol=1e-5, msg=f"{name}: {key}")


def test_padding_of_the_other_task_changes_nothing():
    model = TwoTaskModel(build("t5"), 1.0)
    collate = Collator(pad_id=0, eos_id=1, start_id=0)
    longer = Encoded((None, ([4] * 30 + [1], [7] * 20 + [1])))
    alone, beside = model(**collate(ROWS[:2])), model(**collate([*ROWS[:2], longer]))
    torch.testing.assert_close(alone["losses"][0], beside["losses"][0], rtol=1e-5, atol=1e-6)


def test_an_empty_batch_and_an_empty_task_give_zero_and_whole_gradients():
    model = TwoTaskModel(build("t5-v1.1"), 1.0).train()
    collate = Collator(pad_id=0, eos_id=1, start_id=0)
    for rows, losses in (([], [True, True]), ([ROWS[1]], [False, True])):
        model.zero_grad()
        out = model(**collate(rows))
        assert (out["losses"] == 0).tolist() == losses
        out["loss"].backward()
        # data parallel waits for every parameter's gradient, so each must be there, finite
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_no_tensor_in_training_has_vocabulary_times_positions():
    config = T5Config(**{**SIZE, "vocab_size": 5000})
    model = TwoTaskModel(T5ForConditionalGeneration(config), 1.0, workspace_mb=0.5).train()
    rows = [Encoded((([5] * 9 + [1], [6, 1]), ([7] * 9 + [1], [8] * 60 + [1]))) for _ in range(16)]
    batch = Collator(pad_id=0, eos_id=1, start_id=0)(rows)
    n = len(batch["valid_indices"])
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for item in out if isinstance(out, tuple | list) else [out]:
                if isinstance(item, torch.Tensor):
                    largest = max(largest, item.numel())
            return out

    with Watch():
        model(**batch)["loss"].backward()
    assert largest < n * 5000 / 4


def test_lora_trains_adapters_only_and_merges_into_the_same_function():
    pytest.importorskip("peft")
    student = add_lora(build("t5"), 4, None)
    model = TwoTaskModel(student, 1.0).train()
    batch = Collator(pad_id=0, eos_id=1, start_id=0)(ROWS)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        model(**batch)["loss"].backward()
        optimiser.step()
    assert all("lora" in name for name, p in model.named_parameters() if p.requires_grad)
    before = model.eval()(**batch)["losses"]
    plain = merge_lora(student)
    assert not any("lora" in name for name in plain.state_dict())
    torch.testing.assert_close(TwoTaskModel(plain.eval())(**batch)["losses"], before, rtol=1e-4, atol=1e-5)


def test_byte_tokenizer_equals_byt5s():
    judge, ours = ByT5Tokenizer(), byte_tokenizer()
    for text in (
        "plain",
        "Grüße, ½ 日本語 🙂",
        " two  spaces ",
        "\ttab\nline\x00\x7f",
        "<extra_id_3> mark",
        "",
    ):
        assert ours.encode(text).ids == judge(text).input_ids
        ids = judge(text).input_ids[:-1]
        assert ours.decode(ids, skip_special_tokens=True) == judge.decode(ids, skip_special_tokens=True)
    assert ours.get_vocab_size() == len(judge)


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.9, 1.0])
def test_alpha_gives_the_authors_loss_up_to_the_factor_alpha(alpha):
    weight = TrainConfig(alpha=alpha).lambda_
    label, rationale = 1.7, 0.4
    assert alpha * (label + weight * rationale) == pytest.approx(alpha * label + (1 - alpha) * rationale)
