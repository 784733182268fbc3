"""Check a request against the model that is to answer it and against the server's limits."""

from __future__ import annotations

from sbs_edge.serve import errors
from sbs_edge.serve.engine import ModelCard
from sbs_edge.serve.inference_request import InferenceRequest
from sbs_edge.tokens import most_characters

__all__ = ["check_characters", "check_request"]


def check_request(request: InferenceRequest, card: ModelCard, max_texts: int) -> None:
    """Raise 400 for a request this model cannot answer, or one with more than ``max_texts`` texts."""
    if len(request.texts) > max_texts:
        raise errors.bad_request(
            f"The request holds {len(request.texts)} texts; the limit is {max_texts} (max_texts)."
        )
    if card.label_kind == "choices" and request.labels is None and request.want_label:
        raise errors.bad_request("This model needs labels to choose from: send labels.")
    if card.label_kind != "choices" and request.labels is not None:
        raise errors.bad_request("This model has its own labels: leave labels out.")
    if request.explain and not card.explains:
        raise errors.bad_request(
            "This model answers with labels alone: its bundle has no graph that writes rationales. Leave "
            "explain out, or export a student trained with rationales with label_only=False."
        )
    if request.max_new_tokens is not None and request.max_new_tokens > card.max_new_tokens:
        raise errors.bad_request(f"max_new_tokens is over this model's limit of {card.max_new_tokens}.")


def check_characters(texts: list[str], max_source_tokens: int) -> None:
    """Raise 400 for a text that exceeds the token limit by its number of characters alone."""
    most = most_characters(max_source_tokens)
    for index, text in enumerate(texts):
        if len(text) > most:
            raise errors.bad_request(
                f"texts[{index}] has {len(text)} characters; this model reads at most {most} "
                f"({max_source_tokens} tokens). Shorten it, or ask for truncate."
            )
