"""Tokenizers built at run time, judged by transformers and by spelling texts back."""

from __future__ import annotations

import json

import pytest

from sbs_edge.data.builtin import builtin_splits
from sbs_edge.data.load import load_splits
from sbs_edge.data.tokenizer import EOS_ID, PAD_ID, UNK_ID, build_tokenizer, load_tokenizer
from sbs_edge.errors import DataError

PREFIXES = ("[label] ", "[rationale] ")


def _texts(rows):
    return [text for row in rows for text in (row.input, row.label, row.rationale) if text]


def test_word_tokenizer_of_the_built_in_task():
    splits = builtin_splits()
    tokenizer = build_tokenizer([*_texts(splits.train), *splits.task.labels], PREFIXES)
    assert [tokenizer.token_to_id(t) for t in ("<pad>", "</s>", "<unk>")] == [PAD_ID, EOS_ID, UNK_ID]
    # the measured study of this task counted 242 entries with its 3 special ones and 2 prefixes
    assert tokenizer.get_vocab_size() == 242
    labels = [tokenizer.encode(label).ids for label in splits.task.labels]
    assert all(len(ids) == 2 and ids[1] == EOS_ID for ids in labels)
    assert len({ids[0] for ids in labels}) == len(labels)
    for row in [*splits.train, *splits.validation, *splits.test]:
        ids = tokenizer.encode(PREFIXES[0] + row.input).ids
        assert ids[0] == tokenizer.token_to_id("[label]")
        assert ids[-1] == EOS_ID
        assert UNK_ID not in ids
        rationale = tokenizer.encode(row.rationale).ids
        assert tokenizer.decode(rationale) == row.rationale
    assert tokenizer.decode(tokenizer.encode(PREFIXES[0] + splits.test[0].input).ids) == (
        splits.test[0].input.lower()
    )


def test_word_tokenizer_is_the_same_every_time():
    texts = _texts(builtin_splits("ci").train)
    assert build_tokenizer(texts, PREFIXES).to_str() == build_tokenizer(texts, PREFIXES).to_str()


def test_words_outside_the_vocabulary_are_unknown_not_an_error():
    tokenizer = build_tokenizer(["the plant runs"], PREFIXES)
    assert tokenizer.encode("the xyzzy ü 9").ids == [
        tokenizer.token_to_id("the"),
        UNK_ID,
        UNK_ID,
        UNK_ID,
        EOS_ID,
    ]


@pytest.mark.parametrize("name", ["svamp", "cqa"])
def test_unigram_tokenizer_on_real_texts(paper_data, name):
    splits = load_splits(paper_data, dataset=name)
    texts = _texts(splits.train)
    tokenizer = build_tokenizer(texts, ("predict: ", "explain: "), kind="unigram", vocab_size=2000)
    assert [tokenizer.token_to_id(t) for t in ("<pad>", "</s>", "<unk>")] == [PAD_ID, EOS_ID, UNK_ID]
    assert tokenizer.get_vocab_size() <= 2000
    known = set("".join(texts))
    rows = [row for row in splits.test if set(row.input) <= known]
    assert len(rows) > 0.95 * len(splits.test)
    for row in rows:
        for text in (row.input, row.label, row.rationale or ""):
            assert tokenizer.decode(tokenizer.encode(text).ids).split() == text.split()
    ids = tokenizer.encode("predict: " + splits.test[0].input).ids
    assert ids[0] == tokenizer.token_to_id("predict:")
    assert ids[-1] == EOS_ID


def test_unigram_tokenizer_is_the_same_every_time(paper_data):
    texts = _texts(load_splits(paper_data, dataset="svamp").train)
    first, second = (build_tokenizer(texts, PREFIXES, kind="unigram", vocab_size=1000) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()


def test_transformers_and_our_loader_read_what_was_saved(tmp_path):
    transformers = pytest.importorskip("transformers")
    splits = builtin_splits("ci")
    tokenizer = build_tokenizer(_texts(splits.train), PREFIXES)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["type"] == "WordLevel"
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"),
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    ours = load_tokenizer(tmp_path)
    for row in splits.test[:50]:
        assert theirs(PREFIXES[1] + row.input)["input_ids"] == ours.encode(PREFIXES[1] + row.input).ids
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path / "absent")
