"""Chunks of long inputs: every token kept once, in order, with context on both sides."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbs_edge.data.tokenizer import build_tokenizer
from sbs_edge.errors import UsageError
from sbs_edge.tokens import TextTokenizer
from sbs_edge.windows import ChunkReader, LongSettings, chunks_of, kept_tokens


@given(
    n_body=st.integers(1, 400),
    n_head=st.integers(0, 8),
    n_tail=st.integers(0, 1),
    size=st.integers(24, 90),
    overlap=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9]),
    marked=st.booleans(),
)
def test_every_token_is_kept_once_and_in_order(
    n_body: int, n_head: int, n_tail: int, size: int, overlap: float, marked: bool
) -> None:
    body, head, tail = list(range(1000, 1000 + n_body)), list(range(n_head)), [99][:n_tail]

    def marker(part: int, parts: int) -> list[int]:
        return [50] * (len(str(part)) + len(str(parts)))

    chunks = chunks_of(body, head, tail, size, overlap, marker if marked else None)
    opening = len(chunks[0].ids) - len(tail) - min(n_body, len(chunks[0].ids) - n_head - n_tail) - n_head
    kept = [token for token in kept_tokens(chunks) if token != 50]
    assert kept == [*head, *body, *tail]
    assert opening >= 0
    for number, chunk in enumerate(chunks):
        assert len(chunk.ids) <= size
        assert chunk.ids[:n_head] == head
        assert chunk.ids[len(chunk.ids) - n_tail :] == tail
        assert 0 <= chunk.start < chunk.stop <= len(chunk.ids)
        window = [token for token in chunk.ids if token >= 1000]
        assert window == list(range(window[0], window[0] + len(window)))
        assert (50 in chunk.ids) == (marked and len(chunks) > 1)
        if len(chunks) > 1:
            others = [other for other in chunks if other is not chunk]
            assert len(window) == len([token for token in others[0].ids if token >= 1000])
        assert number == 0 or chunk.start >= n_head


def test_neighbouring_windows_share_a_quarter_and_split_it() -> None:
    chunks = chunks_of(list(range(100, 200)), [1], [2], 42, 0.25)
    assert [(chunk.ids[1], chunk.ids[-2]) for chunk in chunks] == [(100, 139), (130, 169), (160, 199)]
    assert [chunk.ids[chunk.start] for chunk in chunks] == [1, 135, 165]
    assert [chunk.ids[chunk.stop - 1] for chunk in chunks] == [134, 164, 2]


def test_an_input_that_fits_is_one_chunk_as_it_is() -> None:
    (chunk,) = chunks_of([5, 6, 7], [1], [2], 8, 0.25, lambda part, parts: [9])
    assert (chunk.ids, chunk.start, chunk.stop) == ([1, 5, 6, 7, 2], 0, 5)


def test_a_beginning_that_leaves_no_place_is_refused() -> None:
    with pytest.raises(UsageError, match="a beginning of 30 tokens that stands in every chunk"):
        chunks_of(list(range(100)), list(range(30)), [2], 40, 0.25)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"chunk": 4}, "at least 8 tokens"),
        ({"overlap": 1.0}, "share in"),
        ({"max_tokens": 9}, "less than one chunk"),
        ({"top_k": 0}, "at least 1"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(wrong: dict[str, float], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        LongSettings(**{"chunk": 16, "max_tokens": 100, **wrong})  # type: ignore[arg-type]


def test_settings_survive_the_manifest() -> None:
    settings = LongSettings(chunk=64, max_tokens=999, header="|", marker=True, top_k=7, trained="full")
    assert LongSettings.of(settings.describe()) == settings
    assert LongSettings.of(None) is None


@pytest.mark.parametrize("kind", ["word", "unigram"])
@pytest.mark.parametrize("header", ["", " | "])
def test_a_text_keeps_its_tokens_and_repeats_its_header(kind: str, header: str) -> None:
    words = " ".join(f"{word} {number}" for number in range(60) for word in ("pump", "valve", "part of"))
    text = "which unit is loud | " + words
    texts = TextTokenizer(build_tokenizer([text], ["[label] "], kind, 120))  # type: ignore[arg-type]
    settings = LongSettings(chunk=96, max_tokens=5000, header=header, marker=True)
    ids = texts.encode(text, "[label] ")
    chunks = ChunkReader(texts, settings, 1).chunks(text, ids, "[label] ")
    assert len(chunks) > 3
    markers = set(kept_tokens(chunks)) ^ set(ids)
    assert not markers or len(kept_tokens(chunks)) > len(ids)
    for number, chunk in enumerate(chunks, 1):
        read = texts.decode(chunk.ids)
        assert f"part {number} of {len(chunks)}" in read
        assert ("which unit is loud |" in read) == (bool(header) or number == 1)
    first = chunks[0]
    n_marker = len(texts.encode(f"part 1 of {len(chunks)}")) - 1
    kept = kept_tokens(chunks)
    begin = next(at for at in range(len(kept)) if kept[at : at + n_marker] == texts.encode(
        f"part 1 of {len(chunks)}")[:-1])  # fmt: skip
    assert kept[:begin] + kept[begin + n_marker :] == ids
    assert first.start == 0
