"""Load a checkpoint of the T5 family exactly as its files describe it, under transformers 4.57 and 5.

The two versions read some files differently, so the differences are resolved here, from the files:

* The head. Version 4.57 ties it unless the configuration says otherwise, and drops the head in the file. Version 5
  writes "tied" into every configuration, whatever the head. Here a head that differs from the embedding stays
  a separate head.
* The factor before the head, ``d_model ** -0.5`` or 1. Version 5 and our training write ``scale_decoder_outputs``;
  in older files ``tie_word_embeddings`` decides (false: 1). For mT5 and UMT5, version 5 writes neither: it never
  scales mT5 and always scales UMT5, and their files are read accordingly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sbs_edge.errors import MissingExtra, UsageError
from sbs_edge.training.checkpoint import Checkpoint, open_checkpoint
from sbs_edge.training.depth import Layers, kept_layers, kept_tensors
from sbs_edge.training.model import is_tied, measure_logit_scale
from sbs_edge.training.tensors import read_tensors

__all__ = ["load_checkpoint", "load_opened", "save_model"]

NAMED = 3
HEAD, TABLE = "lm_head.weight", "shared.weight"
_TABLES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# Checkpoints of 2019 and 2020 have a position bias in cross-attention, which no model has used since.
_OBSOLETE = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)


def load_checkpoint(name: str, dropout: float | None = None) -> Any:
    """Load the checkpoint ``name`` of the T5 family in float32.

    Args:
        name: a directory, or a name on a hub (see :func:`sbs_edge.training.checkpoint.open_checkpoint`).
        dropout: rate instead of the checkpoint's; None: its own.

    Returns:
        A ``T5ForConditionalGeneration`` or its mT5 or UMT5 form, in evaluation mode, adapters merged.

    Raises:
        UsageError: there is no such checkpoint, it is of another kind, or its files are incomplete.

    """
    return load_opened(open_checkpoint(name), dropout)


def load_opened(
    checkpoint: Checkpoint,
    dropout: float | None = None,
    encoder_layers: Layers | None = None,
    decoder_layers: Layers | None = None,
) -> Any:
    """Load an opened checkpoint, or some of its layers.

    Args:
        checkpoint: see :func:`sbs_edge.training.checkpoint.open_checkpoint`.
        dropout: rate in place of the checkpoint's; None: its own.
        encoder_layers: encoder layers to keep (see :func:`sbs_edge.training.depth.kept_layers`); None: all.
        decoder_layers: the same for the decoder.

    Returns:
        As :func:`load_checkpoint`; its configuration has the numbers of layers kept.

    Raises:
        UsageError: as for :func:`load_checkpoint`, or the checkpoint has fewer layers.

    """
    folder = checkpoint.folder
    settings = _settings(checkpoint)
    if dropout is not None:
        settings.dropout_rate = dropout
    kept = {
        "encoder": kept_layers(encoder_layers, settings.num_layers, "encoder"),
        "decoder": kept_layers(decoder_layers, settings.num_decoder_layers, "decoder"),
    }
    tensors = _one_table(read_tensors(folder), folder)
    own = _own_head(tensors, checkpoint)
    settings.tie_word_embeddings = not own
    model = _filled(settings, tensors, own, folder)
    if checkpoint.adapter is not None:
        model = _merged(model, checkpoint.adapter)
    if encoder_layers is not None or decoder_layers is not None:
        # After an adapter is merged: its tensors are named after the layers it was trained on.
        settings.num_layers, settings.num_decoder_layers = len(kept["encoder"]), len(kept["decoder"])
        present = {name: tensor for name, tensor in model.state_dict().items() if name not in _TABLES}
        if not own:
            present.pop(HEAD)
        model = _filled(settings, kept_tensors(present, kept), own, folder)
    _scale_to(model, _logit_scale(checkpoint))
    return model.eval()


def save_model(model: Any, folder: Path) -> None:
    """Write ``config.json``, ``generation_config.json`` and the weights, so that every version reads the same model.

    The configuration says if the head is not the embedding, and always has the factor before the head.
    """
    model.config.tie_word_embeddings = is_tied(model)
    model.config.scale_decoder_outputs = measure_logit_scale(model) != 1.0
    model.save_pretrained(folder)


def _settings(checkpoint: Checkpoint) -> Any:
    """Return transformers' configuration, with special tokens filled in."""
    from transformers import AutoConfig

    try:
        settings = AutoConfig.from_pretrained(str(checkpoint.folder))
    except Exception as error:  # version 5 validates with errors of its own
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise UsageError(
            f"{checkpoint.folder / 'config.json'} is not a configuration that transformers can read: {reason}. "
            "Copy it again "
            "from where the checkpoint was saved."
        ) from error
    for name, standard in (("pad_token_id", 0), ("eos_token_id", 1)):
        value = getattr(settings, name, None)
        if isinstance(value, list):
            if len(value) != 1:
                raise UsageError(
                    f"{checkpoint.folder / 'config.json'} has several values of {name} ({value}). A student has "
                    "one: write "
                    "the one that ends a text."
                )
            value = value[0]
        setattr(settings, name, standard if value is None else value)
    settings.decoder_start_token_id = checkpoint.start_id
    return settings


def _one_table(tensors: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Return the tensors with the embedding once, under its own name, and without unused tensors.

    Raises:
        UsageError: encoder and decoder have different embeddings.
    """
    found = {name: tensor for name, tensor in tensors.items() if name not in (*_TABLES, *_OBSOLETE)}
    tables = [(name, tensors[name]) for name in (TABLE, *_TABLES) if name in tensors]
    for name, table in tables[1:]:
        if not _same(table, tables[0][1]):
            raise UsageError(
                f"{folder} has two different embeddings, {tables[0][0]} and {name}. A model of the T5 family "
                "has a single one for "
                "encoder and decoder, so this checkpoint is of another kind."
            )
    if tables:
        found[TABLE] = tables[0][1]
    return found


def _same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and (
        (first.data_ptr() == second.data_ptr() and first.dtype == second.dtype) or torch.equal(first, second)
    )


def _own_head(tensors: dict[str, Tensor], checkpoint: Checkpoint) -> bool:
    """Return whether the LM head has its own weights; a tied head is removed from ``tensors``.

    Raises:
        UsageError: the configuration says that it has its own weights, but the files lack them.
    """
    said = checkpoint.config.get("tie_word_embeddings")
    head = tensors.get(HEAD)
    if head is None:
        if said is False and TABLE in tensors:
            raise UsageError(
                f"{checkpoint.folder} lacks {HEAD}, although its config.json says that the head has weights of "
                "its own "
                '("tie_word_embeddings": false). Copy the weights again; or write true there if the head is the embedding.'
            )
        return False
    if said is not False and TABLE in tensors and _same(head, tensors[TABLE]):
        del tensors[HEAD]
        return False
    return True


def _filled(settings: Any, tensors: dict[str, Tensor], own_head: bool, folder: Path) -> Any:
    """Return the model that ``settings`` describe, with the files' tensors in float32.

    Raises:
        UsageError: a tensor is missing, left over, or of another shape.
    """
    from transformers import AutoModelForSeq2SeqLM, GenerationConfig

    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(settings)
    shapes = {name: value.shape for name, value in model.state_dict().items() if name not in _TABLES}
    if not own_head:
        shapes.pop(HEAD, None)
    absent, left = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
    if absent:
        raise UsageError(
            f"{folder} lacks {len(absent)} tensor(s) of the model that its config.json describes: "
            f"{_few(absent)}. Copy it "
            "again from where it was saved, or train again."
        )
    if left:
        raise UsageError(
            f"{folder} has {len(left)} tensor(s) that a language model of the T5 family does not have: "
            f"{_few(left)}. It "
            "is not the model that its config.json describes, and a part of it would be lost."
        )
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise UsageError(
                f"{folder} has {name} in the shape {tuple(tensors[name].shape)}, but its config.json describes "
                f"{tuple(shape)}. The two do not belong together; copy both again from where the checkpoint was "
                "saved."
            )
    # Copies: the files may be replaced while the model lives.
    state = {name: tensors[name].to(torch.float32, copy=True) for name in shapes}
    model.load_state_dict(state, strict=False, assign=True)
    model.set_input_embeddings(model.shared)
    if not own_head:
        model.lm_head.weight = model.shared.weight
    if (folder / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(str(folder))
        except (OSError, ValueError) as error:
            raise UsageError(f"{folder / 'generation_config.json'} cannot be read: {error}.") from error
    for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id"):
        if getattr(model.generation_config, name, None) is None:
            setattr(model.generation_config, name, getattr(settings, name))
    return model


def _logit_scale(checkpoint: Checkpoint) -> float:
    """Return the factor before the LM head that the files describe (see the module's docstring)."""
    config = checkpoint.config
    said, family = config.get("scale_decoder_outputs"), config["model_type"]
    if isinstance(said, bool):
        scaled = said
    elif family != "t5" and _written_by_5(config):
        scaled = family == "umt5"
    else:
        scaled = config.get("tie_word_embeddings") is not False
    return float(config["d_model"]) ** -0.5 if scaled else 1.0


def _written_by_5(config: Any) -> bool:
    major = str(config.get("transformers_version") or "").partition(".")[0]
    return major.isdigit() and int(major) >= 5


def _scale_to(model: Any, wanted: float) -> None:
    """Set the factor before the LM head to ``wanted`` if this version of transformers would use another."""
    if hasattr(model.config, "scale_decoder_outputs"):
        model.config.scale_decoder_outputs = wanted != 1.0
    found = measure_logit_scale(model)
    if found != wanted:
        factor = wanted / found
        model.lm_head.register_forward_pre_hook(lambda _module, args: (args[0] * factor, *args[1:]))


def _merged(model: nn.Module, adapter: Path) -> Any:
    """Return ``model`` with a LoRA adapter added to its weights."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise MissingExtra("peft", "train", "Merging a LoRA adapter") from error
    try:
        return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise UsageError(
            f"The LoRA adapter in {adapter} does not fit its base, or is damaged: {reason}. Copy it again from "
            "where it was "
            "saved, or correct base_model_name_or_path in its adapter_config.json."
        ) from error


def _few(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
