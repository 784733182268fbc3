"""Training on texts and labels that a tokenizer cannot spell, and on checkpoints that leave things open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from sbs_edge.data.example import Example, Splits, TaskSpec
from sbs_edge.errors import UsageError
from sbs_edge.tokens import TextTokenizer
from sbs_edge.training.config import TrainConfig
from sbs_edge.training.evaluate import evaluate
from sbs_edge.training.student_dir import StudentDir
from sbs_edge.training.tokens import checkpoint_tokenizer
from sbs_edge.training.train import train


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small random T5 whose vocabulary has no braces, whose config names no start and whose tokenizer cuts."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -6.0)]
    pieces += [(chr(c), -9.0) for c in range(33, 127) if chr(c) not in "{}<>"]
    tokenizer = Tokenizer(models.Unigram(pieces, 2, False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.enable_truncation(6)
    tokenizer.enable_padding(length=12)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    config = T5Config(vocab_size=len(fast) + 5, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=2)
    config.decoder_start_token_id = None
    folder = tmp_path / "checkpoint"
    T5ForConditionalGeneration(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def splits_of(labels: tuple[str, ...], kind: str) -> Splits:
    rows = [Example(str(i), f"text {i % 2}", label=labels[i % 2]) for i in range(8)]
    task = TaskSpec("t", kind, labels if kind == "closed" else ())  # type: ignore[arg-type]
    return Splits(task, train=rows, validation=rows[:4], test=[])


def config_of(checkpoint: Path, steps: int = 2) -> TrainConfig:
    return TrainConfig(
        model=str(checkpoint),
        mode="finetune",
        max_steps=steps,
        batch_size=8,
        learning_rate=1e-2,
        dropout=0.0,
        select="last",
    )


def test_a_file_that_cuts_and_a_config_without_a_start_train(checkpoint: Path, tmp_path: Path) -> None:
    assert json.loads((checkpoint / "tokenizer.json").read_text())["truncation"]
    splits = splits_of(("follow up soon", "follow up late"), "closed")
    train(splits, tmp_path / "student", config_of(checkpoint))
    config = json.loads((tmp_path / "student/config.json").read_text())
    assert config["decoder_start_token_id"] == 0
    saved = json.loads((tmp_path / "student/tokenizer.json").read_text())
    assert saved["truncation"] is saved["padding"] is None
    texts = StudentDir.load(tmp_path / "student").text_tokenizer()
    assert len(texts.encode("follow up soon")) == 16


@pytest.mark.parametrize(
    ("labels", "said"), [(("{", "yes"), "no token"), (("a b", "a\nb"), "nothing to learn")]
)
def test_labels_are_refused_before_the_first_step(
    checkpoint: Path, tmp_path: Path, labels: tuple[str, ...], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        train(splits_of(labels, "closed"), tmp_path / "student", config_of(checkpoint))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]


def test_open_labels_are_judged_as_they_were_trained(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = train(splits_of(("a{b", "c d\ne"), "open"), tmp_path / "student", config_of(checkpoint, 150))
    assert done.metrics["eval_label_token_accuracy"] == 1.0
    found = evaluate(tmp_path / "student")
    assert found["label_accuracy"] == 1.0
    assert found["labels_respelled"] == 4
    assert done.metrics["spelling"]["labels"]["lost"] == 1
    assert "1 of 2 labels hold characters that the tokenizer cannot spell: 'a{b' becomes 'ab'" in (
        capsys.readouterr().err
    )


def test_a_tokenizer_that_reads_otherwise_than_its_pieces_is_refused(tmp_path: Path, spiece: Any) -> None:
    judge = spiece
    pieces = [(judge.id_to_piece(i), judge.get_score(i)) for i in range(judge.get_piece_size())]
    tokenizer = Tokenizer(models.Unigram(pieces, 2, False))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path)
    assert TextTokenizer(checkpoint_tokenizer(tmp_path)).encode("order")[-1] == 1
    path = tmp_path / "tokenizer.json"
    saved = json.loads(path.read_text())
    saved["pre_tokenizer"] = None
    path.write_text(json.dumps(saved))
    with pytest.raises(UsageError, match=r"spiece\.model beside it"):
        checkpoint_tokenizer(tmp_path)


def test_rationales_that_are_not_learned_are_not_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [Example(str(i), f"text {i}", ("yes", "no")[i % 2], rationale="a , b") for i in range(16)]
    splits = Splits(TaskSpec("t", "closed", ("yes", "no")), tuple(rows), tuple(rows[:4]))
    small = {"d_model": 16, "d_ff": 16, "n_layers": 1, "n_decoder_layers": 1, "max_steps": 1, "trackers": ()}
    train(splits, tmp_path / "labels", mode="finetune", **small)
    assert "cannot spell" not in capsys.readouterr().err
