"""Text to token ids: no text yields control tokens, a long text is read from its beginning, labels survive."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, processors

from sbs_edge.data.check import check_dataset
from sbs_edge.data.example import Example, TaskSpec
from sbs_edge.data.tokenizer import build_tokenizer, byte_tokenizer
from sbs_edge.errors import UsageError
from sbs_edge.export.checkpoint import write_byte_tokenizer
from sbs_edge.export.labels import plan_labels
from sbs_edge.label_tokens import check_choices, spelling_of_rows, spelling_sentences
from sbs_edge.runtime.texts import Texts, check_texts
from sbs_edge.tokens import (
    TextTokenizer,
    first_tokens,
    most_characters,
    read_tokenizer,
    start_token_id,
    within_limit,
)
from sbs_edge.training.batches import Encoder
from sbs_edge.training.config import TrainConfig

T5 = Path(__file__).resolve().parents[3] / "shared/cases/checkpoints/t5_tokenizer/tokenizer.json"
PREFIXES = ("[label] ", "[rationale] ")
CONTROL = [
    "</s>",
    "<pad>",
    "<unk>",
    "<extra_id_0>",
    "<extra_id_99>",
    "[label]",
    "[rationale]",
    "＜/s＞",
    "<pad",
]


@pytest.fixture(scope="session")
def t5() -> TextTokenizer:
    if not T5.is_file():
        pytest.skip(f"{T5} is absent: the real T5 tokenizer")
    return TextTokenizer(read_tokenizer(T5))


def built(kind: str) -> TextTokenizer:
    texts = ["where is my order", "label rationale pad s <>/[]_0123456789", "extra id unk"]
    return TextTokenizer(build_tokenizer(texts, PREFIXES, kind, 200))


BUILT = {kind: built(kind) for kind in ("word", "unigram")} | {"byte": TextTokenizer(byte_tokenizer())}

words = (
    st.lists(
        st.one_of(
            st.sampled_from(CONTROL), st.text(max_size=8), st.sampled_from([" ", "\n", "order", "{", "日"])
        )
    )
    .map("".join)
    .filter(lambda text: text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text))
)


def no_control(texts: TextTokenizer, text: str, prefix: str) -> None:
    ids = texts.encode(text, prefix)
    head = texts.encode("", prefix)[:-1]
    controls_of_prefix = sum(index in texts.control for index in head)
    body = ids[: len(ids) - 1]
    assert sum(index in texts.control for index in body) == controls_of_prefix
    assert ids[-1] == texts.encode("x")[-1]


@settings(max_examples=200, deadline=None)
@given(text=words, prefix=st.sampled_from(["", "classify: ", *PREFIXES]))
@pytest.mark.parametrize("kind", sorted(BUILT))
def test_no_text_yields_a_control_token(kind: str, text: str, prefix: str) -> None:
    no_control(BUILT[kind], text, prefix)


@settings(max_examples=300, deadline=None)
@given(text=words, prefix=st.sampled_from(["", "classify: ", *PREFIXES]))
def test_no_text_yields_a_control_token_of_t5(t5: TextTokenizer, text: str, prefix: str) -> None:
    no_control(t5, text, prefix)


@pytest.mark.parametrize("text", CONTROL[:5])
def test_t5_spells_what_looks_like_a_control_token(t5: TextTokenizer, text: str) -> None:
    ids = t5.encode(f"my {text} order", "classify: ")
    assert t5.tokenizer.encode(f"classify: my {text} order").ids != ids
    letters = text.strip("<>/").replace("_", "")
    assert letters in t5.decode(ids).replace("_", "").replace(" ", "")
    assert t5.encode("my order", "classify: ") == t5.tokenizer.encode("classify: my order").ids


@pytest.mark.parametrize("kind", sorted(BUILT))
@pytest.mark.parametrize("prefix", ["", "classify: ", "[label] "])
def test_ordinary_text_has_the_library_s_ids(kind: str, prefix: str) -> None:
    texts = BUILT[kind]
    for text in ("where is my order", "an unknown ж and {", " two  blanks "):
        assert texts.encode(text, prefix) == texts.tokenizer.encode(prefix + text).ids
        assert texts.encode_batch([text], prefix) == [texts.encode(text, prefix)]


def test_a_byte_written_as_text_is_spelled() -> None:
    from tokenizers import decoders, models

    vocabulary = (
        {"<unk>": 0}
        | {f"<0x{b:02X}>": b + 1 for b in range(256)}
        | {c: 300 + i for i, c in enumerate("<0x41>")}
    )
    model = models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    texts = TextTokenizer(tokenizer)
    assert texts.respelled("<0x41>") == "<0x41>"
    assert texts.respelled("é") == "é"


# -- the file's own settings ---------------------------------------------------------------------------


def test_truncation_and_padding_in_the_file_are_switched_off(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(["where is my order please"], PREFIXES, "unigram", 200)
    plain = tokenizer.encode("where is my order please").ids
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=12)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert json.loads((tmp_path / "tokenizer.json").read_text())["truncation"]
    limits = {"max_source_tokens": 64, "max_label_tokens": 32}
    texts = Texts((tmp_path / "tokenizer.json").read_bytes(), {"label": ""}, limits, 1)
    assert texts.tokenize(["where is my order please"], "label") == [plain]
    assert texts.label_tokens("where") == tokenizer_ids(tokenizer, "where")
    plan = plan_labels(TaskSpec("t", "closed", ("where is", "where")), tokenizer, 1)
    assert [len(ids) for ids in plan.token_ids] == [len(texts.label_tokens(x)) for x in plan.labels]


def tokenizer_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return list(tokenizer.encode(text).ids)


def test_a_template_without_end_or_with_a_beginning() -> None:
    tokenizer = build_tokenizer(["yes no"], (), "unigram", 60)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    texts = TextTokenizer(tokenizer)
    assert texts.encode_target("yes", 1)[-1] == 1
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<unk> $A </s>", special_tokens=[("</s>", 1), ("<unk>", 2)]
    )
    texts = TextTokenizer(tokenizer)
    ids = texts.encode("yes </s>")
    assert (ids[0], ids[-1], ids.count(1)) == (2, 1, 1)


# -- long texts ----------------------------------------------------------------------------------------

pieces = st.one_of(
    st.sampled_from(
        ["order ", "a", " ", "\n", "é", "ﬁ", "日本", "e\u0301 ", "</s>", "x1 y2 ", "\u00a0", "-"]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
)
long_texts = st.lists(st.tuples(pieces, st.integers(1, 400)), min_size=3, max_size=8).map(
    lambda runs: "".join(piece * n for piece, n in runs)
)


@settings(max_examples=150, deadline=None)
@given(text=long_texts, limit=st.sampled_from([8, 32, 100]))
def test_a_beginning_has_the_first_ids_of_the_whole_text(t5: TextTokenizer, text: str, limit: int) -> None:
    same_beginning(t5, text, limit)


@settings(max_examples=100, deadline=None)
@given(text=long_texts, limit=st.sampled_from([8, 32]))
@pytest.mark.parametrize("kind", sorted(BUILT))
def test_a_beginning_of_built_tokenizers(kind: str, text: str, limit: int) -> None:
    same_beginning(BUILT[kind], text, limit)


def same_beginning(texts: TextTokenizer, text: str, limit: int) -> None:
    text = text[: most_characters(limit)]
    whole = texts.encode(text, "classify: ")
    (ids,) = texts.encode_beginnings([text], limit, "classify: ")
    assert (len(ids) > limit) == (len(whole) > limit)
    assert within_limit(ids, limit, 1) == within_limit(whole, limit, 1)


def test_a_text_of_megabytes_is_not_tokenised_whole(t5: TextTokenizer) -> None:
    text = "please cancel my order " * 80_000
    (ids,) = t5.encode_beginnings([text], 512)
    assert 512 < len(ids) < 2048
    for text in ("ab" * 900_000, "a" + " " * 1_800_000 + "b", "日" * 1_000_000, "</s>" * 300_000):
        ids, cut = t5.encode_within(text, 512, 1)
        assert cut
        assert len(ids) <= 512


def test_a_cut_text_ends_with_end_of_sequence() -> None:
    assert within_limit([5, 6, 7, 1], 3, 1) == [5, 6, 1]
    assert within_limit([5, 6, 1], 3, 1) == [5, 6, 1]


def test_training_and_runtime_give_the_same_ids(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(["where is my order refund"], PREFIXES, "unigram", 200)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = TrainConfig(max_source_tokens=16)
    encoder = Encoder(tokenizer, config, 1)
    limits = {"max_source_tokens": 16, "max_label_tokens": 8}
    texts = Texts(
        (tmp_path / "tokenizer.json").read_bytes(),
        dict(zip(("label", "rationale"), config.prefix_pair, strict=True)),
        limits,
        1,
    )
    for text in ("where is", "</s> where [label] is [rationale] <pad>", "order " * 5000, "x" * 40_000):
        row = encoder(Example("1", text, label="refund", rationale="where"))
        assert row is not None
        for task, pair in zip(("label", "rationale"), row.tasks, strict=True):
            assert pair is not None
            assert texts.encode([text], task, True)[0] == [pair[0]]


# -- what can be asked ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "Text 1 is empty or blank"),
        (" \t\n", "Text 1 is empty or blank"),
        ("\u200b\ufeff", "Text 1 is empty or blank"),
        (None, "Text 1 is a NoneType, not a string"),
        (b"x", "Text 1 is a bytes, not a string"),
        ("ab\ud800", "Text 1 is not valid Unicode: character 3 is \\ud800"),
    ],
)
def test_a_text_that_cannot_be_asked_is_named(text: object, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        check_texts(iter(["fine", text]))  # type: ignore[list-item]
    assert said in str(refused.value)


def test_texts_are_read_once_from_any_iterable() -> None:
    assert check_texts(text for text in ("a", "b")) == ["a", "b"]


@pytest.mark.parametrize(
    ("config", "start"),
    [
        ({"decoder_start_token_id": 5, "pad_token_id": 3}, 5),
        ({"decoder_start_token_id": None, "pad_token_id": 3}, 3),
        ({"decoder_start_token_id": 0, "pad_token_id": 3}, 0),
        ({}, 0),
    ],
)
def test_the_start_token(config: dict[str, int], start: int) -> None:
    assert start_token_id(config) == start


# -- labels --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (("日本", "Bug"), "no token"),
        (("{", "Bug"), "no token"),
        (("Bug 🐞", "Bug 🦋"), "same tokens"),
        (("Bug", "Bug\n"), "same tokens"),
        (("a\tb", "a b"), "same tokens"),
        (("日½", "中½"), "same tokens"),
    ],
)
def test_labels_that_vanish_or_collide_are_refused(
    t5: TextTokenizer, labels: tuple[str, ...], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        plan_labels(TaskSpec("t", "closed", labels), t5, 1)
    row = Example("7", "x", choices=labels, source="rows.jsonl:7")
    with pytest.raises(UsageError, match=rf"rows.jsonl:7: .*{said}"):
        check_choices([row], t5, 1)


@pytest.mark.parametrize(
    "labels", [("</s>", "<pad>"), ("Bug", "Bug</s>"), ("C++", "C#"), ("Bug", "Bug report")]
)
def test_labels_that_differ_are_told_apart(t5: TextTokenizer, labels: tuple[str, ...]) -> None:
    plan = plan_labels(TaskSpec("t", "closed", labels), t5, 1)
    assert all(ids.count(1) == 1 and not t5.control & {*ids[:-1]} for ids in plan.token_ids)


def test_first_tokens() -> None:
    assert first_tokens([(3, 1), (4, 1)]) == [3, 4]
    assert first_tokens([(3, 1), (3, 4, 1)]) is None


def test_what_the_tokenizer_cannot_spell_is_counted(t5: TextTokenizer, tmp_path: Path) -> None:
    rows = [
        Example("1", "see {this}", label="a{b", rationale="two\nlines"),
        Example("2", "plain", label="half ½", rationale="fine"),
    ]
    report = spelling_of_rows(rows, t5)
    assert {kind: (r["checked"], r["lost"], r["folded"]) for kind, r in report.items()} == {
        "labels": (2, 2, 0), "rationales": (2, 0, 1), "inputs": (2, 1, 0),
    }  # fmt: skip
    assert report["labels"]["examples"][0][0] == "a{b"
    assert len(spelling_sentences(report)) == 3
    data = tmp_path / "rows.jsonl"
    data.write_text(
        "".join(json.dumps({"input": f"text {i}", "label": "{" if i % 2 else "ok"}) + "\n" for i in range(8))
    )
    found = check_dataset(data, tokenizer=T5.parent, label_kind="closed")
    assert not found["ok"]
    assert any("no token" in f["message"] and f["level"] == "stop" for f in found["findings"])
    assert found["spelling"]["labels"]["lost"] == 1


def test_the_byte_tokenizer_is_one(tmp_path: Path) -> None:
    written = read_tokenizer(write_byte_tokenizer(tmp_path))
    assert written.get_vocab_size() == byte_tokenizer().get_vocab_size() == 384
    (tmp_path / "config.json").write_text('{"vocab_size": 259}')
    assert read_tokenizer(write_byte_tokenizer(tmp_path)).get_vocab_size() == 259
