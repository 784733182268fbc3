"""Smaller tokenizers read kept texts as before and spell the rest by their own algorithm."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from sbs_edge.errors import UsageError
from sbs_edge.export.vocabulary.tokenizer import always_kept, shrink_tokenizer, vocabulary_of

SENTENCES = [
    "the pump is cold and the valve is hot", "a motor makes a noise in the north room", "leaking pipes were found at night",
    "the filter was changed on monday, 17 times", "Grüße aus der Werkstatt; the belt is torn",
] * 4  # fmt: skip
SEEN = ["the pump is cold", "a noise at night", "17 pipes"]
SPECIAL = ["<pad>", "</s>", "<unk>"]


def _finished(tokenizer: Tokenizer) -> dict[str, Any]:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return dict(json.loads(tokenizer.to_str()))


def unigram() -> dict[str, Any]:
    """As T5 has it, the special tokens last, so that every id moves."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        SENTENCES,
        trainers.UnigramTrainer(
            vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        ),
    )
    saved = json.loads(tokenizer.to_str())
    pieces = saved["model"]["vocab"]
    saved["model"]["vocab"] = pieces[3:] + pieces[:3]
    saved["model"]["unk_id"] = len(pieces) - 1
    for token in saved["added_tokens"]:
        token["id"] += len(pieces) - 3
    return _finished(Tokenizer.from_str(json.dumps(saved)))


def bpe(byte_level: bool) -> dict[str, Any]:
    tokenizer = Tokenizer(models.BPE(unk_token=None if byte_level else "<unk>"))
    tokenizer.pre_tokenizer = (
        pre_tokenizers.ByteLevel(add_prefix_space=False) if byte_level else pre_tokenizers.Metaspace()
    )
    tokenizer.decoder = decoders.ByteLevel() if byte_level else decoders.Metaspace()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if byte_level else []
    tokenizer.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=420 if byte_level else 160,
            special_tokens=SPECIAL,
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return _finished(tokenizer)


def words() -> dict[str, Any]:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        SENTENCES, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False)
    )
    return _finished(tokenizer)


KINDS = {"unigram": unigram, "bpe": lambda: bpe(False), "byte-level bpe": lambda: bpe(True), "words": words}


def _pair(kind: str, seen: list[str]) -> tuple[Tokenizer, Tokenizer, list[int]]:
    saved = KINDS[kind]()
    whole = Tokenizer.from_str(json.dumps(saved))
    keep = {index for text in seen for index in whole.encode(text).ids}
    less, kept = shrink_tokenizer(saved, keep)
    return whole, Tokenizer.from_str(json.dumps(less)), kept


@pytest.mark.parametrize("kind", list(KINDS))
def test_seen_texts_have_the_same_tokens_under_new_ids(kind: str) -> None:
    whole, small, kept = _pair(kind, SEEN)
    assert small.get_vocab_size() == len(kept) < whole.get_vocab_size()
    for text in SEEN:
        before, after = whole.encode(text), small.encode(text)
        assert after.tokens == before.tokens
        assert [kept[index] for index in after.ids] == before.ids
        assert small.decode(after.ids) == whole.decode(before.ids)
    pair = small.encode("cold", "night")
    assert [kept[index] for index in pair.ids] == whole.encode("cold", "night").ids
    for name in SPECIAL:
        assert kept[small.token_to_id(name)] == whole.token_to_id(name)
    assert {kept[i]: piece for piece, i in small.get_vocab().items()}.items() <= {
        i: piece for piece, i in whole.get_vocab().items()
    }.items()


@pytest.mark.parametrize("kind", ["unigram", "bpe", "byte-level bpe"])
def test_other_texts_are_spelled_in_smaller_pieces(kind: str) -> None:
    whole, small, _ = _pair(kind, SEEN)
    changed = 0
    for text in SENTENCES[:5]:
        before, after = whole.encode(text), small.encode(text)
        changed += before.tokens != after.tokens
        assert small.decode(after.ids) == whole.decode(before.ids)  # nothing is lost
        assert "<unk>" not in after.tokens
        assert len(after.tokens) >= len(before.tokens)
    assert changed  # the pieces are really gone


def test_an_unseen_word_of_a_word_list_is_unknown() -> None:
    _, small, _ = _pair("words", SEEN)
    assert small.encode("the cold motor").tokens == ["the", "cold", "<unk>", "</s>"]


@pytest.mark.parametrize("kind", ["unigram", "bpe", "byte-level bpe"])
@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet="abcdehilmnoprstuvx 17üß", max_size=30), data=st.data())
def test_any_text_in_the_kept_pieces_alone_is_untouched(kind: str, text: str, data: st.DataObject) -> None:
    """If the whole tokenizer's answer uses kept pieces only, the small one gives the same answer."""
    seen = [text, *data.draw(st.lists(st.sampled_from(SENTENCES[:5]), max_size=2))]
    whole, small, kept = _pair(kind, seen)
    assert [kept[index] for index in small.encode(text).ids] == whole.encode(text).ids


def test_what_is_always_kept() -> None:
    saved = unigram()
    pieces = vocabulary_of(saved)
    kept = always_kept(saved)
    assert {pieces[name] for name in SPECIAL} <= kept
    assert {index for piece, index in pieces.items() if len(piece.lstrip("▁")) <= 1} <= kept
    scores = [score for _, score in saved["model"]["vocab"]]
    assert scores.index(min(scores)) in kept  # the price of the unknown piece is taken from it
    assert len(kept) < len(pieces)
    with pytest.raises(UsageError, match=r"'WordPiece'.*prune_input_vocabulary"):
        shrink_tokenizer({"model": {"type": "WordPiece", "vocab": {}}}, [])


def test_older_merges_are_read_too() -> None:
    saved = bpe(False)
    older = {
        **saved,
        "model": {**saved["model"], "merges": [" ".join(pair) for pair in saved["model"]["merges"]]},
    }
    before = Tokenizer.from_str(json.dumps(saved)).encode(SEEN[0])
    less, kept = shrink_tokenizer(older, before.ids)
    assert kept == shrink_tokenizer(saved, before.ids)[1]
    assert Tokenizer.from_str(json.dumps(less)).encode(SEEN[0]).tokens == before.tokens
