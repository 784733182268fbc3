"""Decoders over the states of chunks, against PyTorch with the same states concatenated."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from graph_students import make_ending, make_student, open_graph
from transformers.modeling_outputs import BaseModelOutput

from sbs_edge.export.graphs.generate import build_rationale_generator
from sbs_edge.export.graphs.label import build_label_classifier
from sbs_edge.export.graphs.states import (
    build_state_choice_classifier,
    build_state_encoder,
    build_state_label_classifier,
    build_state_rationale_generator,
    build_state_trie_classifier,
)
from sbs_edge.export.graphs.trie import build_choice_classifier, build_trie_classifier
from sbs_edge.export.graphs.weights import weights_of
from sbs_edge.export.quant.precision import Float32, Int8
from sbs_edge.runtime.trie import batch_tries, build_trie
from sbs_edge.windows import chunks_of

LABELS = (17, 33, 201)
COLLIDING = ([17, 33, 1], [17, 1], [17, 33, 5, 1], [201, 9, 1])
ALL = np.array(2**31, np.int64)


def document(length: int = 150, chunk: int = 48) -> list[Any]:
    body = np.random.default_rng(3).integers(3, 320, length).tolist()
    return chunks_of(body, [7], [1], chunk, 0.25)


def torch_states(model: Any, chunks: list[Any]) -> torch.Tensor:
    """(1, N, d): each chunk through PyTorch's encoder on its own, the kept states joined."""
    with torch.no_grad():
        parts = [
            model.get_encoder()(input_ids=torch.tensor([chunk.ids])).last_hidden_state[
                :, chunk.start : chunk.stop
            ]
            for chunk in chunks
        ]
    return torch.cat(parts, 1)


def our_states(encoder: Any, chunks: list[Any]) -> np.ndarray:
    parts = []
    for chunk in chunks:
        ids = np.array([chunk.ids], np.int64)
        (states,) = encoder.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
        parts.append(states[:, chunk.start : chunk.stop])
    return np.ascontiguousarray(np.concatenate(parts, 1))


def torch_logits(model: Any, states: torch.Tensor, fed: list[int]) -> np.ndarray:
    with torch.no_grad():
        out = model(
            encoder_outputs=BaseModelOutput(last_hidden_state=states), decoder_input_ids=torch.tensor([fed])
        )
    return out.logits[0].double().numpy()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def test_chunks_are_scored_and_continued_as_by_pytorch(student: Any) -> None:
    weights, chunks = weights_of(student), document()
    assert len(chunks) == 4
    expected_states = torch_states(student, chunks)
    states = our_states(open_graph(build_state_encoder(weights, Float32())), chunks)
    assert states.shape == (1, 152, weights.d_model)
    assert np.abs(states - expected_states.numpy()).max() < 1e-4 * float(expected_states.abs().max())
    feeds = {"states": states, "top_k": ALL}

    logits = torch_logits(student, expected_states, [0])[0]
    graph = open_graph(build_state_label_classifier(weights, Float32(), LABELS))
    (got,) = graph.run(None, feeds)
    assert np.abs(got[0] - logits[list(LABELS)]).max() < 1e-4 * np.abs(logits).max()

    sums = [
        log_softmax(torch_logits(student, expected_states, [0, *label[:-1]]))[range(len(label)), label].sum()
        for label in COLLIDING
    ]
    (got,) = open_graph(build_state_trie_classifier(weights, Float32(), COLLIDING)).run(None, feeds)
    assert np.abs(got[0] - sums).max() < 1e-4 * np.abs(sums).max()
    choices = open_graph(build_state_choice_classifier(weights, Float32()))
    tries = batch_tries([build_trie(COLLIDING, 0)])
    (got,) = choices.run(None, {**feeds, **tries})
    assert np.abs(got[0, : len(COLLIDING)] - sums).max() < 1e-4 * np.abs(sums).max()

    explainer = open_graph(build_state_rationale_generator(weights, Float32()))
    (tokens,), (total,) = explainer.run(None, {**feeds, "max_new_tokens": np.array(12, np.int64)})
    written = tokens.tolist()
    logits = torch_logits(student, expected_states, [0, *written[:-1]])
    assert logits.argmax(-1).tolist() == written
    expected = log_softmax(logits)[range(len(written)), written].sum()
    assert total == pytest.approx(expected, rel=1e-4)


def test_one_chunk_agrees_with_the_graphs_that_read_tokens() -> None:
    model = make_ending("t5")
    weights, (chunk,) = weights_of(model), chunks_of(list(range(20, 60)), [7], [1], 48, 0.25)
    ids = np.array([chunk.ids], np.int64)
    tokens = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    states = our_states(open_graph(build_state_encoder(weights, Float32())), [chunk])
    feeds = {"states": states, "top_k": ALL}
    tries, limit = batch_tries([build_trie(COLLIDING, 0)]), {"max_new_tokens": np.array(9, np.int64)}
    for long, short, extra in (
        (build_state_label_classifier(weights, Float32(), LABELS),
         build_label_classifier(weights, Float32(), LABELS), {}),
        (build_state_trie_classifier(weights, Float32(), COLLIDING),
         build_trie_classifier(weights, Float32(), COLLIDING), {}),
        (build_state_choice_classifier(weights, Float32()), build_choice_classifier(weights, Float32()), tries),
        (build_state_rationale_generator(weights, Float32()),
         build_rationale_generator(weights, Float32()), limit),
    ):  # fmt: skip
        ours = open_graph(long).run(None, {**feeds, **extra})
        theirs = open_graph(short).run(None, {**tokens, **extra})
        for got, expected in zip(ours, theirs, strict=True):
            assert np.allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_top_k_reads_each_heads_best_states() -> None:
    model = make_student("t5")
    weights, chunks = weights_of(model), document()
    states = our_states(open_graph(build_state_encoder(weights, Float32())), chunks)
    graph = open_graph(build_state_label_classifier(weights, Float32(), LABELS))
    explainer = open_graph(build_state_rationale_generator(weights, Float32()))

    def scores(top_k: int) -> np.ndarray:
        return np.asarray(graph.run(None, {"states": states, "top_k": np.array(top_k, np.int64)})[0])

    def tokens(top_k: int) -> list[int]:
        feeds = {
            "states": states,
            "top_k": np.array(top_k, np.int64),
            "max_new_tokens": np.array(8, np.int64),
        }
        return list(explainer.run(None, feeds)[0][0])

    n_states = states.shape[1]
    assert np.array_equal(scores(n_states), scores(10**6))
    assert np.allclose(scores(n_states - 1), scores(n_states), atol=0.1)
    assert tokens(n_states) == tokens(10**6)
    assert not np.allclose(scores(1), scores(n_states))

    def masked_scores(top_k: int) -> np.ndarray:
        """The same by PyTorch: every cross-attention's scores below the k-th are masked before the softmax."""
        plain = torch.nn.functional.softmax
        model.set_attn_implementation("eager")  # other kernels have no softmax to replace

        def best_only(products: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
            if products.shape[-1] == n_states:
                least = products.topk(top_k, dim=-1).values[..., -1:]
                products = products.masked_fill(products < least, -1e9)
            return plain(products, *args, **named)

        torch.nn.functional.softmax = best_only
        try:
            return torch_logits(model, torch_states(model, chunks), [0])[0, list(LABELS)]
        finally:
            torch.nn.functional.softmax = plain

    for top_k in (1, 3, 40):
        expected = masked_scores(top_k)
        assert np.abs(scores(top_k)[0] - expected).max() < 1e-4 * np.abs(expected).max()


def test_int8_states_do_not_depend_on_company() -> None:
    weights = weights_of(make_student("t5"))
    norms = {name.removesuffix(".weight"): 4.0 for name in weights.arrays if "layer_norm" in name}
    encoder = open_graph(build_state_encoder(weights, Int8(norms)))
    ids = np.random.default_rng(5).integers(3, 320, (6, 48)).astype(np.int64)
    (together,) = encoder.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    for row in range(6):
        own = ids[row : row + 1]
        (alone,) = encoder.run(None, {"input_ids": own, "attention_mask": np.ones_like(own)})
        assert np.array_equal(alone[0], together[row])


def test_int8_decoders_stay_close_to_float() -> None:
    weights, chunks = weights_of(make_student("t5", spread=0.5)), document()
    states = our_states(open_graph(build_state_encoder(weights, Float32())), chunks)
    feeds = {"states": states, "top_k": np.array(64, np.int64)}
    for build in (
        lambda numbers: build_state_label_classifier(weights, numbers, LABELS),
        lambda numbers: build_state_trie_classifier(weights, numbers, COLLIDING),
    ):
        (exact,) = open_graph(build(Float32())).run(None, feeds)
        (rounded,) = open_graph(build(Int8({}))).run(None, feeds)
        assert np.abs(rounded - exact).max() < 0.1 * np.abs(exact).max()
