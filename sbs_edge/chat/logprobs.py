"""Log-probabilities that a server sent beside its text, and the distribution over labels in them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sbs_edge.chat.labels import choice_letter, fold
from sbs_edge.data.rows import is_text

__all__ = ["KEPT_TOKENS", "label_distribution", "logprob_fields", "read_logprobs"]

KEPT_TOKENS = 32
"""The label stands at the end of an answer: the alternatives of earlier tokens are not kept."""

_ORNAMENT = " \t\r\n\"'`*_#“”‘’([{<:"
_UNLIKELY = -1000.0  # servers write -9999 or less for what they did not compute


def logprob_fields(count: int, *, chat: bool) -> dict[str, Any]:
    """Return the fields of a request that ask for the ``count`` likeliest tokens at each place."""
    return {"logprobs": True, "top_logprobs": count} if chat else {"logprobs": count}


def read_logprobs(found: Any) -> tuple[tuple[str, dict[str, float]], ...]:
    """Return the last tokens of an answer, each with the log-probabilities at its place.

    Both layouts of the protocol are read, a chat's and a completion's; what has neither shape gives ``()``.
    """
    if not isinstance(found, dict):
        return ()
    places: list[tuple[str, dict[str, float]]] = []
    if isinstance(content := found.get("content"), list):
        for item in content[-KEPT_TOKENS:]:
            if not isinstance(item, dict) or not isinstance(item.get("token"), str):
                return ()
            top = item.get("top_logprobs")
            pairs = [item, *(top if isinstance(top, list) else [])]
            places.append(
                (
                    item["token"],
                    _table((p.get("token"), p.get("logprob")) for p in pairs if isinstance(p, dict)),
                )
            )
    elif isinstance(tokens := found.get("tokens"), list):
        chosen, top = found.get("token_logprobs"), found.get("top_logprobs")
        for index in range(max(0, len(tokens) - KEPT_TOKENS), len(tokens)):
            token = tokens[index]
            if not isinstance(token, str):
                return ()
            own = chosen[index] if isinstance(chosen, list) and index < len(chosen) else None
            others = top[index] if isinstance(top, list) and index < len(top) else None
            pairs = [(token, own), *(others.items() if isinstance(others, dict) else ())]
            places.append((token, _table(pairs)))
    return tuple(places) if all(is_text(token) for token, _ in places) else ()


def _table(pairs: Any) -> dict[str, float]:
    table: dict[str, float] = {}
    for token, value in pairs:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if isinstance(token, str) and is_text(token) and number and _UNLIKELY < value <= 1e-3:
            table[token] = round(min(float(value), 0.0), 6)
    return table


def label_distribution(
    places: Sequence[tuple[str, Mapping[str, float]]],
    label: str,
    known: Sequence[str],
    *,
    lettered: bool = False,
) -> dict[str, float]:
    """Return the probability of each known label at the place where the answer names its label.

    The place is the last one from which the text goes on as ``label``. Each alternative there counts for the
    label that it begins; one that begins several counts for the answered label if that is among them, else for
    none. The probabilities are those of the server: they need not sum to 1.

    Args:
        places: see :func:`read_logprobs`.
        label: the label that was read out of the answer.
        known: the labels that may be answered.
        lettered: whether the answer names choices by their letters, ``(c) math problem``.

    Returns:
        Label to probability; empty where the place is not found.

    Example:
        >>> places = [(" is", {}), (" ref", {" ref": -0.1, " rep": -2.4}), ("und", {"und": 0.0})]
        >>> {name: round(p, 2) for name, p in label_distribution(places, "refund", ["refund", "reply"]).items()}
        {'refund': 0.9, 'reply': 0.09}

    """
    spellings = [{name: fold(name) for name in known}]
    if lettered:
        spellings.insert(0, {name: f"{choice_letter(index)})" for index, name in enumerate(known)})
    for spelled in spellings:
        start = _start(places, spelled[label]) if label in spelled else None
        if start is not None:
            return _shares(places[start][1], spelled, label)
    return {}


def _shares(table: Mapping[str, float], spelled: Mapping[str, str], label: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for token, value in table.items():
        beginning = fold(token.lstrip(_ORNAMENT))
        if not beginning:
            continue
        begun = [name for name, form in spelled.items() if form.startswith(beginning)]
        if len(begun) > 1:
            exact = [name for name in begun if spelled[name] == beginning]
            begun = exact or ([label] if label in begun else [])
        if len(begun) == 1:
            found[begun[0]] = found.get(begun[0], 0.0) + math.exp(value)
    return found


def _start(places: Sequence[tuple[str, Mapping[str, float]]], form: str) -> int | None:
    """Return the last place from which the text goes on as ``form``, on a token that is part of it."""
    rest = ""
    for index in range(len(places) - 1, -1, -1):
        token = places[index][0]
        rest = token + rest
        plain = fold(rest.lstrip(_ORNAMENT))
        ends = not (form[-1].isalnum() and plain[len(form) : len(form) + 1].isalnum())
        if fold(token.lstrip(_ORNAMENT)) and plain.startswith(form) and ends:
            return index
    return None
