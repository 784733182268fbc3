"""A student may start from some of a checkpoint's layers; its directory is then an ordinary, shallower checkpoint."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForSeq2SeqLM,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from sbs_edge import UsageError, train
from sbs_edge.cli.app import main
from sbs_edge.data.example import Example, Splits
from sbs_edge.training.checkpoint import open_checkpoint
from sbs_edge.training.config import TrainConfig, make_config
from sbs_edge.training.depth import kept_layers, parse_layers
from sbs_edge.training.evaluate import evaluate
from sbs_edge.training.model import cache_options
from sbs_edge.training.pretrained import load_checkpoint, load_opened, save_model
from sbs_edge.training.student_dir import StudentDir

SHAPE = {"vocab_size": 48, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 5, "num_decoder_layers": 4,
         "num_heads": 2, "relative_attention_num_buckets": 6, "relative_attention_max_distance": 9,
         "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1, "dropout_rate": 0.0}  # fmt: skip
FAMILIES: dict[str, tuple[Any, Any]] = {
    "t5": (T5Config, T5ForConditionalGeneration),
    "mt5": (MT5Config, MT5ForConditionalGeneration),
    "umt5": (UMT5Config, UMT5ForConditionalGeneration),
}
SOURCE, TARGET = torch.tensor([[5, 9, 7, 30, 11, 8, 1]]), torch.tensor([[0, 6, 8, 20, 33]])


def write_checkpoint(folder: Path, family: str = "t5", tied: bool = True) -> Path:
    torch.manual_seed(4)
    config, model = FAMILIES[family]
    made = model(config(**SHAPE, tie_word_embeddings=tied)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    save_model(made, folder)
    return folder


def shallow_by_hand(model: Any, kept: dict[str, tuple[int, ...]]) -> Any:
    """Cut the live model's stacks; where layer 0 goes, its table of position biases moves to the new first layer."""
    model = copy.deepcopy(model)
    for stack, indices in kept.items():
        blocks = getattr(model, stack).block
        first, own = blocks[indices[0]].layer[0].SelfAttention, blocks[0].layer[0].SelfAttention
        if not first.has_relative_attention_bias:
            first.has_relative_attention_bias = True
            first.relative_attention_bias = own.relative_attention_bias
        getattr(model, stack).block = torch.nn.ModuleList([blocks[index] for index in indices])
    return model


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize(
    ("encoder", "decoder", "kept"),
    [
        ("3", 2, {"encoder": (0, 2, 4), "decoder": (0, 3)}),
        ("1,4", (2, 3), {"encoder": (1, 4), "decoder": (2, 3)}),  # layer 0 goes: its table moves
        (None, "1,", {"encoder": (0, 1, 2, 3, 4), "decoder": (1,)}),
        (1, None, {"encoder": (0,), "decoder": (0, 1, 2, 3)}),
    ],
)
def test_the_layers_kept_are_an_ordinary_checkpoint(
    tmp_path: Path, family: str, tied: bool, encoder: Any, decoder: Any, kept: dict[str, tuple[int, ...]]
) -> None:
    whole = load_checkpoint(str(write_checkpoint(tmp_path / "whole", family, tied)))
    model = load_opened(open_checkpoint(str(tmp_path / "whole")), None, encoder, decoder)
    save_model(model, tmp_path / "shallow")
    config = json.loads((tmp_path / "shallow" / "config.json").read_text())
    assert (config["num_layers"], config["num_decoder_layers"]) == tuple(map(len, kept.values()))

    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "shallow").eval()
    by_hand = shallow_by_hand(whole, kept)
    with torch.no_grad():
        wanted = by_hand(input_ids=SOURCE, decoder_input_ids=TARGET, use_cache=False).logits
        for found in (model, again):
            assert torch.equal(found(input_ids=SOURCE, decoder_input_ids=TARGET).logits, wanted)
        # With a cache, layers are found by their number.
        wrote = again.generate(SOURCE, max_new_tokens=6, do_sample=False, **cache_options(again))
        logits = by_hand(input_ids=SOURCE, decoder_input_ids=wrote, use_cache=False).logits
    assert logits.argmax(-1)[0, : wrote.shape[1] - 1].tolist() == wrote[0, 1:].tolist()


def test_an_adapter_is_merged_before_its_layers_go(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = write_checkpoint(tmp_path / "base")
    model = peft.get_peft_model(
        T5ForConditionalGeneration.from_pretrained(base), peft.LoraConfig(r=2, target_modules=["q", "v"])
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(tmp_path / "adapter")
    opened = open_checkpoint(str(tmp_path / "adapter"))
    found, kept = load_opened(opened, None, 2, "1,3"), {"encoder": (0, 4), "decoder": (1, 3)}
    with torch.no_grad():
        wanted = shallow_by_hand(load_opened(opened), kept)(
            input_ids=SOURCE, decoder_input_ids=TARGET, use_cache=False
        ).logits
        assert torch.equal(found(input_ids=SOURCE, decoder_input_ids=TARGET).logits, wanted)


@given(there=st.integers(1, 40), share=st.floats(0, 1))
def test_a_number_of_layers_is_spread_evenly(there: int, share: float) -> None:
    wanted = max(1, round(share * there))
    kept = kept_layers(wanted, there, "encoder")
    assert len(kept) == wanted
    assert kept[0] == 0
    assert wanted == 1 or kept[-1] == there - 1
    gaps = {b - a for a, b in itertools.pairwise(kept)}
    assert not gaps or (min(gaps) >= 1 and max(gaps) - min(gaps) <= 1)


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        ("0", "at least 1 layer"),
        ("", "neither a number of layers"),
        ("two", "'two' is neither a number of layers, such as 2, nor indices"),
        ("-1", "neither a number of layers"),
        ("0,,3", "neither a number of layers"),
        ("3,0", "the indices 3,0 must ascend"),
        ("1,1", "must ascend"),
        (2.5, "encoder_layers"),
    ],
)
def test_a_wrong_value_is_refused_before_anything_is_read(given_: Any, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        make_config(None, {"model": "x", "encoder_layers": given_})


def test_values_are_kept_in_one_form() -> None:
    config = TrainConfig(model="x", encoder_layers="0, 3,5", decoder_layers="2")
    assert (config.encoder_layers, config.decoder_layers) == ((0, 3, 5), 2)
    assert TrainConfig(**config.model_dump()) == config
    assert TrainConfig.model_validate_json(config.model_dump_json()) == config
    assert parse_layers("5,") == (5,)


def test_from_scratch_there_are_no_layers_to_keep() -> None:
    with pytest.raises(UsageError, match=r"give model too.*n_layers and n_decoder_layers set the depth"):
        make_config(None, {"decoder_layers": 2})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, splits: Splits) -> Path:
    """A student of three layers a stack, whose directory is a checkpoint with a tokenizer."""
    out = tmp_path_factory.mktemp("checkpoint") / "student"
    train(
        splits, out, d_model=16, d_ff=32, n_heads=2, n_layers=3, n_decoder_layers=3, max_steps=2, batch_size=8,
        trackers=(), threads=1, progress=False,
    )  # fmt: skip
    return out


def test_more_layers_than_there_are(tmp_path: Path, checkpoint: Path, splits: Splits, small: Any) -> None:
    for name, value, said in (
        (
            "encoder_layers",
            4,
            "encoder has 3 layers, and encoder_layers asks for 4 of them. Give a number from 1 to 3",
        ),
        (
            "decoder_layers",
            "0,3",
            "decoder has 3 layers, and decoder_layers asks for layer 3, counted from 0",
        ),
    ):
        with pytest.raises(UsageError, match=re.escape(said)):
            train(
                splits, tmp_path / "student", model=str(checkpoint), **{name: value}, max_steps=1, trackers=()
            )
    assert not (tmp_path / "student").exists()


def test_a_decoder_deeper_than_its_encoder_is_evaluated(
    tmp_path: Path, checkpoint: Path, splits: Splits
) -> None:
    train(splits, tmp_path / "student", model=str(checkpoint), encoder_layers=1, max_steps=1, max_target_tokens=16,
          trackers=(), threads=1)  # fmt: skip
    found = evaluate(tmp_path / "student", splits.test[:4], predictions=True)
    assert [row["rationale"] for row in found["predictions"]] == _greedy(
        tmp_path / "student", splits.test[:4]
    )


def _greedy(student: Path, rows: Sequence[Example]) -> list[str]:
    """Write rationales token by token, without a cache."""
    opened, model = StudentDir.load(student), load_checkpoint(str(student))
    tokenizer = opened.text_tokenizer()
    texts = []
    for row in rows:
        ids, wrote = torch.tensor([tokenizer.encode(row.input, "[rationale] ")]), [0]
        while len(wrote) <= 16 and wrote[-1] != 1:
            with torch.no_grad():
                logits = model(input_ids=ids, decoder_input_ids=torch.tensor([wrote]), use_cache=False).logits
            wrote.append(int(logits[0, -1].argmax()))
        texts.append(tokenizer.decode(wrote[1:-1] if wrote[-1] == 1 else wrote[1:]))
    return texts


@pytest.mark.parametrize(("command", "place"), [("train", "student"), ("run", "students/step-by-step")])
def test_the_commands_train_a_shallower_student(
    tmp_path: Path, checkpoint: Path, splits: Splits, command: str, place: str
) -> None:
    from sbs_edge.data.jsonl import write_examples

    rows = tmp_path / "rows.jsonl"
    write_examples(rows, [*splits.train, *splits.validation])
    out = tmp_path / "out"
    steps = ["--max-steps", "2"] if command == "train" else ["--steps", "2", "--max-drop", "100"]
    more = [] if command == "train" else ["--min-rationale-agreement", "0", "--training", "progress=false"]
    asked = ["--encoder-layers", "2", "--decoder-layers", "1,"]
    assert (
        main([command, str(rows), "--model", str(checkpoint), *asked, *steps, *more, "--out", str(out)]) == 0
    )
    student = out if command == "train" else out / place
    model = T5ForConditionalGeneration.from_pretrained(student)
    assert (len(model.encoder.block), len(model.decoder.block)) == (2, 1)
    metrics = json.loads((student / "sbs_edge.json").read_text())
    assert metrics["training"]["layers"] == {"encoder": 2, "decoder": 1}
    assert (metrics["config"]["encoder_layers"], metrics["config"]["decoder_layers"]) == (2, [1])
