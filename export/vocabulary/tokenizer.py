"""A tokenizer with fewer pieces, which reads the texts of the pieces it kept as before and spells the others.

Works on the content of ``tokenizer.json`` (the tokenizers library's format). What happens to a text that needs a
dropped piece is left to the tokenizer's own algorithm: Unigram and BPE take smaller pieces, a word list takes
its unknown token.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from sbs_edge.errors import UsageError

__all__ = ["always_kept", "shrink_tokenizer", "vocabulary_of"]

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_MARKS = "▁Ġ"  # how Unigram and byte-level BPE write the space before a word
_KINDS = ("Unigram", "BPE", "WordLevel")


def vocabulary_of(saved: Mapping[str, Any]) -> dict[str, int]:
    """Return every piece's id, pieces that were added to the model's own included.

    Raises:
        UsageError: the tokenizer is of a kind that cannot be made smaller.
    """
    model = saved["model"]
    kind = model.get("type", "BPE")
    if kind not in _KINDS:
        raise UsageError(
            f"The tokenizer is of the kind {kind!r}; only {', '.join(_KINDS)} can be made smaller. Leave "
            "out prune_input_vocabulary."
        )
    own = (
        {piece: index for index, (piece, _) in enumerate(model["vocab"])}
        if kind == "Unigram"
        else dict(model["vocab"])
    )
    return own | {token["content"]: token["id"] for token in saved.get("added_tokens") or ()}


def always_kept(saved: Mapping[str, Any]) -> set[int]:
    """Return ids without which texts could no longer be spelled, or would be cut differently.

    Added tokens (specials, prefixes), single characters with and without the mark of a space, byte pieces, the
    unknown piece, and of Unigram the piece with the lowest score, from which the cost of the unknown is taken.
    """
    pieces, model = vocabulary_of(saved), saved["model"]
    kept = {token["id"] for token in saved.get("added_tokens") or ()}
    kept |= {
        index for piece, index in pieces.items() if len(piece.lstrip(_MARKS)) <= 1 or _BYTE.fullmatch(piece)
    }
    if model.get("unk_id") is not None:
        kept.add(model["unk_id"])
    if model.get("unk_token") in pieces:
        kept.add(pieces[model["unk_token"]])
    if model.get("type") == "Unigram":
        kept.add(min(range(len(model["vocab"])), key=lambda index: model["vocab"][index][1]))
    return kept


def shrink_tokenizer(saved: Mapping[str, Any], keep: Collection[int]) -> tuple[dict[str, Any], list[int]]:
    """Return the content of a smaller ``tokenizer.json`` and the old ids it kept; place n is the new id n.

    Args:
        saved: the content of ``tokenizer.json``.
        keep: ids to keep. What :func:`always_kept` says is kept too, and of BPE the parts that a kept piece is
            merged from, so that it is still reached.
    """
    model = dict(saved["model"])
    pieces = vocabulary_of(saved)
    wanted = (set(keep) | always_kept(saved)) & set(pieces.values())
    if model.get("type", "BPE") == "BPE":
        wanted = _with_parts(model, pieces, wanted)
    kept = sorted(wanted)
    place = {old: new for new, old in enumerate(kept)}
    if model.get("type") == "Unigram":
        model["vocab"] = [pair for old, pair in enumerate(model["vocab"]) if old in place]
        if model.get("unk_id") is not None:
            model["unk_id"] = place[model["unk_id"]]
    else:
        model["vocab"] = {piece: place[old] for piece, old in model["vocab"].items() if old in place}
        if "merges" in model:
            known = model["vocab"]
            model["merges"] = [
                merge
                for merge in model["merges"]
                if all(piece in known for piece in _pieces_of(model, merge))
            ]
    return {
        **saved,
        "truncation": None,
        "padding": None,
        "added_tokens": [{**token, "id": place[token["id"]]} for token in saved.get("added_tokens") or ()],
        "post_processor": _moved(saved.get("post_processor"), place),
        "model": model,
    }, kept


def _pieces_of(model: Mapping[str, Any], merge: Any) -> tuple[str, str, str]:
    """Return (left, right, merged) of one of BPE's merges, in the newer or older form of the file."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    prefix = model.get("continuing_subword_prefix") or ""
    return left, right, left + right.removeprefix(prefix)


def _with_parts(model: Mapping[str, Any], pieces: Mapping[str, int], wanted: Iterable[int]) -> set[int]:
    """Add whatever the wanted pieces can be merged from, down to single symbols."""
    parts: dict[int, list[int]] = {}
    for merge in model.get("merges") or ():
        left, right, merged = _pieces_of(model, merge)
        parts.setdefault(pieces[merged], []).extend((pieces[left], pieces[right]))
    found, todo = set(), list(wanted)
    while todo:
        piece = todo.pop()
        if piece not in found:
            found.add(piece)
            todo.extend(parts.get(piece, ()))
    return found


def _moved(part: Any, place: Mapping[int, int]) -> Any:
    """Return a post-processor's content with the new ids of the tokens it adds."""
    if isinstance(part, list):
        return [_moved(item, place) for item in part]
    if not isinstance(part, dict):
        return part
    moved = {key: _moved(value, place) for key, value in part.items()}
    for name, entry in (part.get("special_tokens") or {}).items():
        moved["special_tokens"][name] = {**entry, "ids": [place[index] for index in entry["ids"]]}
    for key in ("sep", "cls"):
        if key in part:
            moved[key] = [part[key][0], place[part[key][1]]]
    return moved
