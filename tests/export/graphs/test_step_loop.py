"""The encoder and step graphs under the runtime's own loop: every token and log-probability, against ``generate``."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from graph_students import make_ending, make_student, open_graph, random_rows

from sbs_edge.errors import UsageError
from sbs_edge.export.graphs.generate import build_rationale_generator
from sbs_edge.export.graphs.step import build_decoder_step, build_encoder
from sbs_edge.export.graphs.weights import weights_of
from sbs_edge.export.quant.half import to_half
from sbs_edge.export.quant.precision import Float32
from sbs_edge.runtime.generation import StepLoop

STANDARD = Float32(contrib=False)
START, EOS = 0, 1


class InMemory:
    """A runtime session over a graph that is not on disk, which counts its calls."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._session = open_graph(model)
        self.calls = 0

    @property
    def inference(self) -> Any:
        return self

    def run_with_iobinding(self, binding: Any) -> None:
        self.calls += 1
        self._session.run_with_iobinding(binding)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


def loop_of(model: Any, room: int, *, half: bool = False, output_tokens: Any = None) -> tuple[StepLoop, Any]:
    weights = weights_of(model)
    graphs = [build_encoder(weights, STANDARD), build_decoder_step(weights, STANDARD, room, output_tokens)]
    encoder, step = (InMemory(to_half(graph, "fp16") if half else graph) for graph in graphs)
    return StepLoop(encoder, step, START, EOS), step


def generated(model: Any, ids: np.ndarray, mask: np.ndarray, limit: int) -> np.ndarray:
    with torch.no_grad():
        return model.generate(
            input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), do_sample=False, num_beams=1,
            max_new_tokens=limit, use_cache=False,
        )[:, 1:].numpy()  # fmt: skip


@pytest.mark.parametrize("limit", [1, 2, 20])
def test_every_token_is_that_of_generate(student: Any, limit: int) -> None:
    loop, _ = loop_of(student, 20)
    explainer = open_graph(build_rationale_generator(weights_of(student), Float32()))
    for rows, length in ((4, 24), (1, 1), (3, 150)):
        ids, mask = random_rows(rows, length, seed=limit)
        tokens, log_p = loop.run(ids, mask, limit)
        np.testing.assert_array_equal(tokens, generated(student, ids, mask, limit))
        feeds = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": np.array(limit, np.int64)}
        same, expected = explainer.run(None, feeds)
        np.testing.assert_array_equal(tokens, same)
        np.testing.assert_allclose(log_p, expected, rtol=1e-4, atol=1e-5)
        assert log_p.dtype == np.float32
        assert log_p.shape == (rows,)


@pytest.mark.parametrize("family", ["untied_scaled", "v1_1", "umt5"])
def test_the_loop_ends_with_the_last_row_and_pads_the_others(family: str) -> None:
    model = make_ending(family)
    loop, step = loop_of(model, 60)
    ids, mask = random_rows(12, 24, seed=5)
    expected = generated(model, ids, mask, 60)
    ended = [row for row in range(12) if EOS in expected[row]]
    ids, mask, expected = ids[ended], mask[ended], expected[ended]
    ends = [row.index(EOS) + 1 for row in expected.tolist()]
    assert len(set(ends)) > 1  # rows end at different steps
    tokens, log_p = loop.run(ids, mask, 60)
    assert step.calls == tokens.shape[1] == max(ends) < 60
    np.testing.assert_array_equal(tokens, expected[:, : max(ends)])
    # What a row writes does not depend on the longest row's steps after its own end.
    for row, end in enumerate(ends):
        assert (tokens[row, end:] == 0).all()
        alone, log_p_alone = loop.run(ids[row : row + 1], mask[row : row + 1], 60)
        assert alone[0].tolist() == tokens[row, :end].tolist()
        assert log_p_alone[0] == pytest.approx(float(log_p[row]), rel=1e-4)


def test_nothing_left_in_the_caches_is_read() -> None:
    model = make_student("umt5")
    weights = weights_of(model)
    step = open_graph(build_decoder_step(weights, STANDARD, 6))
    ids, mask = random_rows(2, 8, ragged=False)
    cross = open_graph(build_encoder(weights, STANDARD)).run(None, {"input_ids": ids, "attention_mask": mask})
    results = []
    for rubbish in (0.0, np.nan):
        state: dict[str, np.ndarray] = {
            f"past_{i}": np.full((2, 4, 6, 16), rubbish, np.float32) for i in range(4)
        }
        state |= {
            "token": np.zeros((2, 1), np.int64), "position": np.zeros(1, np.int64),
            "finished": np.zeros((2, 1), bool), "score": np.zeros((2, 1), np.float32),
        }  # fmt: skip
        fixed = {f"cross_{i}": c for i, c in enumerate(cross)} | {"attention_mask": mask}
        names = [output.name for output in step.get_outputs()]
        for _ in range(3):
            out = dict(zip(names, step.run(None, {**state, **fixed}), strict=True))
            state = {n.replace("next_", "").replace("present_", "past_"): v for n, v in out.items()}
        results.append(state)
    assert results[0]["position"].tolist() == [3]
    for name, value in results[0].items():
        assert np.isfinite(value.astype(np.float64)).all()
        np.testing.assert_array_equal(value, results[1][name])


def test_half_precision_runs_on_the_host_too() -> None:
    model = make_student("v1_1", spread=0.5)
    half, _ = loop_of(model, 20, half=True)
    exact, _ = loop_of(model, 20)
    ids, mask = random_rows(6, 20)
    (got, got_p), (expected, expected_p) = half.run(ids, mask, 20), exact.run(ids, mask, 20)
    assert (got[:, 0] == expected[:, 0]).all()
    assert (got == expected).mean() > 0.6  # random weights: after one near tie a row goes its own way
    same = (got == expected).all(axis=1)
    assert same.any()
    np.testing.assert_allclose(got_p[same], expected_p[same], rtol=0.05)


def test_a_smaller_vocabulary_to_write() -> None:
    model = make_student("t5")
    allowed = np.concatenate([[1], np.arange(2, 320, 3)])
    loop, _ = loop_of(model, 12, output_tokens=allowed)
    ids, mask = random_rows(3, 15)
    graph = open_graph(build_rationale_generator(weights_of(model), Float32(), allowed))
    expected, log_p = graph.run(
        None, {"input_ids": ids, "attention_mask": mask, "max_new_tokens": np.array(12, np.int64)}
    )
    tokens, found = loop.run(ids, mask, 12)
    np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_allclose(found, log_p, rtol=1e-4)
    assert np.isin(tokens[tokens != 0], allowed).all()


def test_more_tokens_than_the_cache_holds_are_refused() -> None:
    loop, _ = loop_of(make_student("t5"), 5)
    ids, mask = random_rows(1, 4)
    assert loop.run(ids, mask, 5)[0].shape == (1, 5)
    with pytest.raises(UsageError, match=r"is 6, .* holds 5"):
        loop.run(ids, mask, 6)
