"""A downloaded checkpoint gives the model that is in its files, or is refused with lines that help."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from sbs_edge.errors import UsageError
from sbs_edge.training.checkpoint import open_checkpoint, weight_files
from sbs_edge.training.model import is_tied
from sbs_edge.training.pretrained import load_checkpoint, save_model
from sbs_edge.training.tokens import checkpoint_tokenizer

SHAPE = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 2}
CLASSES: dict[str, tuple[Any, Any]] = {
    "t5": (T5Config, T5ForConditionalGeneration),
    "mt5": (MT5Config, MT5ForConditionalGeneration),
    "umt5": (UMT5Config, UMT5ForConditionalGeneration),
}
HEAD, TABLE = "lm_head.weight", "shared.weight"
SOURCE, TARGET = torch.tensor([[5, 9, 7, 1]]), torch.tensor([[0, 6, 8]])


def tensors_of(family: str, tied: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    config, model = CLASSES[family]
    made = model(config(**SHAPE, tie_word_embeddings=tied))
    names = [name for name in made.state_dict() if not name.endswith("embed_tokens.weight")]
    found = {name: torch.randn_like(made.state_dict()[name]) * 0.3 for name in names}
    if tied:
        found.pop(HEAD, None)
    return found


def write_config(folder: Path, family: str = "t5", **more: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"model_type": family, "architectures": [CLASSES[family][1].__name__], **SHAPE,
                "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1, **more}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings))


def whole(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def pickled(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    torch.save(tensors, folder / "pytorch_model.bin")


def old_pickled(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def sharded(folder: Path, tensors: dict[str, torch.Tensor], ending: str = "safetensors") -> None:
    names, stem = sorted(tensors), "model" if ending == "safetensors" else "pytorch_model"
    index = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"{stem}-{number:05d}-of-00002.{ending}"
        chosen = {name: tensors[name] for name in part}
        save_file(chosen, folder / file) if ending == "safetensors" else torch.save(chosen, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def sharded_bin(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    sharded(folder, tensors, "bin")


def prefixed(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    whole(folder, {f"module.{name}": value for name, value in tensors.items()})


def with_tables(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    more = {f"{side}.embed_tokens.weight": tensors[TABLE] for side in ("encoder", "decoder")}
    pickled(folder, tensors | more)


WRITERS = [whole, pickled, old_pickled, sharded, sharded_bin, prefixed, with_tables]


def logits_by_hand(model: Any, head: torch.Tensor, factor: float) -> torch.Tensor:
    """Compute the logits from the stacks' output with the head of the file."""
    states = model.get_encoder()(SOURCE).last_hidden_state
    hidden = model.get_decoder()(TARGET, encoder_hidden_states=states).last_hidden_state
    return (hidden * factor) @ head.T


def check(folder: Path, tensors: dict[str, torch.Tensor], factor: float) -> Any:
    model = load_checkpoint(str(folder))
    state = model.state_dict()
    for name, value in tensors.items():
        assert torch.equal(state[name], value), name
    with torch.no_grad():
        found = model(input_ids=SOURCE, decoder_input_ids=TARGET).logits
        wanted = logits_by_hand(model, tensors.get(HEAD, tensors[TABLE]), factor)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    return model


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", list(CLASSES))
def test_every_layout_gives_the_model_in_the_files(
    tmp_path: Path, family: str, tied: bool, writer: Callable[..., None]
) -> None:
    tensors = tensors_of(family, tied)
    write_config(tmp_path, family, tie_word_embeddings=tied)
    writer(tmp_path, tensors)
    model = check(tmp_path, tensors, 0.25 if tied else 1.0)
    assert is_tied(model) is tied
    save_model(model, tmp_path / "again")
    check(tmp_path / "again", tensors, 0.25 if tied else 1.0)


def test_another_head_than_the_embedding_stays_where_the_config_says_tied(tmp_path: Path) -> None:
    tensors = tensors_of("t5", False)
    write_config(tmp_path, tie_word_embeddings=True, scale_decoder_outputs=False)
    whole(tmp_path, tensors)
    assert not is_tied(check(tmp_path, tensors, 1.0))


@pytest.mark.parametrize(("family", "factor"), [("umt5", 0.25), ("mt5", 1.0)])
def test_the_factor_of_a_file_of_version_5(tmp_path: Path, family: str, factor: float) -> None:
    tensors = tensors_of(family, False)
    write_config(tmp_path, family, tie_word_embeddings=True, transformers_version="5.2.0")
    whole(tmp_path, tensors)
    check(tmp_path, tensors, factor)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"architectures": ["T5ForSequenceClassification"]}, "does not write text"),
        ({"architectures": ["T5EncoderModel"]}, "does not write text"),
        ({"architectures": ["T5ForQuestionAnswering"]}, "does not write text"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised by gptq"),
        ({"model_type": "bart"}, "'bart' model"),
        ({"model_type": "longt5"}, "'longt5' model"),
        ({"model_type": "switch_transformers"}, "'switch_transformers' model"),
    ],
)
def test_another_model_is_refused(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    write_config(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text()) | changed
    (tmp_path / "config.json").write_text(json.dumps(settings))
    whole(tmp_path, tensors_of("t5", True))
    with pytest.raises(UsageError, match=said):
        load_checkpoint(str(tmp_path))


def test_tensors_of_another_model_are_refused(tmp_path: Path) -> None:
    write_config(tmp_path)
    whole(tmp_path, tensors_of("t5", True) | {"classification_head.dense.weight": torch.zeros(2, 2)})
    with pytest.raises(UsageError, match=r"classification_head\.dense\.weight"):
        load_checkpoint(str(tmp_path))


def test_a_file_that_runs_code_is_not_opened(tmp_path: Path) -> None:
    write_config(tmp_path)
    torch.save({"shared.weight": Path("x")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match="more than tensors"):
        load_checkpoint(str(tmp_path))


def test_shards_of_deepspeed_and_fsdp_are_named_with_the_line_that_joins_them(tmp_path: Path) -> None:
    write_config(tmp_path / "zero")
    (tmp_path / "zero" / "zero_to_fp32.py").write_text("# output_dir")
    with pytest.raises(UsageError, match=r"python zero_to_fp32\.py \. \."):
        weight_files(tmp_path / "zero")
    write_config(tmp_path / "fsdp")
    (tmp_path / "fsdp" / "pytorch_model_fsdp_0").mkdir()
    with pytest.raises(UsageError, match="accelerate merge-weights"):
        weight_files(tmp_path / "fsdp")


def test_a_trainers_folder_and_a_hubs_cache_lead_to_their_checkpoint(tmp_path: Path) -> None:
    write_config(tmp_path / "out" / "checkpoint-500")
    assert open_checkpoint(str(tmp_path / "out")).folder == tmp_path / "out" / "checkpoint-500"
    inner = tmp_path / "models--x" / "snapshots" / "abc"
    write_config(inner)
    assert open_checkpoint(str(tmp_path / "models--x")).folder == inner
    with pytest.raises(UsageError, match=r"Is it .*models--x"):
        open_checkpoint(str(tmp_path / "models-x"))


def test_a_lora_adapter_is_merged_into_its_base(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    tensors = tensors_of("t5", True)
    write_config(tmp_path / "base", tie_word_embeddings=True)
    whole(tmp_path / "base", tensors)
    adapted = peft.get_peft_model(
        load_checkpoint(str(tmp_path / "base")),
        peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q"], init_lora_weights=False),
    )
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    found = load_checkpoint(str(tmp_path / "adapter")).state_dict()
    name = "encoder.block.0.layer.0.SelfAttention.q"
    side = {key: adapted.state_dict()[f"base_model.model.{name}.lora_{key}.default.weight"] for key in "AB"}
    torch.testing.assert_close(found[f"{name}.weight"], tensors[f"{name}.weight"] + 2 * side["B"] @ side["A"])


def test_a_spiece_model_alone_cuts_texts_as_sentencepiece_does(tmp_path: Path, spiece: Any) -> None:
    judge = spiece
    ours = checkpoint_tokenizer(tmp_path)
    for text in ("where is my order", "  it  costs ", "please 4", "ﬁ costs"):
        assert ours.encode(text).ids == [*judge.encode(text), 1]
    size = judge.get_piece_size()
    assert ours.token_to_id("<extra_id_99>") == size
    assert ours.token_to_id("<extra_id_0>") == size + 99
