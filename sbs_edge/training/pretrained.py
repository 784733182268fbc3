"""transformers checkpoints of the T5 family: every tensor from the file, or a refusal."""

from __future__ import annotations

from typing import Any

from sbs_edge.errors import UsageError

__all__ = ["FAMILY", "load_checkpoint"]

FAMILY = ("t5", "mt5", "umt5")
NAMED = 3


def load_checkpoint(name: str, dropout: float | None = None) -> Any:
    """Load a T5-family checkpoint by hub name or directory, in float32 (imports torch).

    transformers fills what a checkpoint lacks with random numbers and a warning; here that is an error.

    Raises:
        UsageError: it cannot be loaded, is of another family, or lacks tensors of its model.

    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    try:
        settings = AutoConfig.from_pretrained(name)
        if settings.model_type not in FAMILY:
            raise UsageError(
                f"The checkpoint {name} is a {settings.model_type!r} model; students are of the T5 family "
                f"({', '.join(FAMILY)}, which includes FLAN-T5 and ByT5)."
            )
        if dropout is not None:
            settings.dropout_rate = dropout
        model, found = AutoModelForSeq2SeqLM.from_pretrained(
            name, config=settings, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except UsageError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        # RuntimeError: a tensor of another shape than config.json says.
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise UsageError(
            f"The checkpoint {name!r} cannot be loaded: {reason}. Give a directory with a config.json and the "
            "model.safetensors that belongs to it, both whole, or the name of a checkpoint on a hub you can reach."
        ) from error
    absent = sorted(found["missing_keys"])
    if absent:
        named = ", ".join(absent[:NAMED]) + (
            f" and {len(absent) - NAMED} more" if len(absent) > NAMED else ""
        )
        raise UsageError(
            f"The checkpoint {name!r} lacks {len(absent)} tensor(s) of the model that its config.json describes: "
            f"{named}. Copy it again from where it was saved, or train again."
        )
    return model
