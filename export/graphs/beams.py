"""Beam search of a fixed width in one graph, with the rules of ``transformers``' ``generate``.

With width w, each row has w running beams and its w best finished beams. Of the 2w best continuations, those among the
first w that end become candidates for the finished beams, with the mean log-probability of their tokens as score. The
best w that do not end keep running. The search stops when no row's best running beam can still beat its worst finished
one, or at the limit, where running beams count as finished.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx

from sbs_edge.export.graphs.blocks import Writer
from sbs_edge.export.graphs.builder import BOOL, FLOAT, INT64, Graph, Value
from sbs_edge.export.graphs.decoder import attend_cache, cross_cache, decode_step
from sbs_edge.export.graphs.encoder import batch_of, expand_batch
from sbs_edge.export.graphs.loops import add_loop, axes, cache_inputs, cache_outputs, text_graph
from sbs_edge.export.graphs.weights import T5Weights
from sbs_edge.export.quant.precision import Precision

__all__ = ["build_beam_generator"]

_NEVER = np.float32(-1e9)


def build_beam_generator(
    weights: T5Weights,
    precision: Precision,
    width: int,
    output_tokens: np.ndarray | None = None,
    step_precision: Precision | None = None,
) -> onnx.ModelProto:
    """Write ``input_ids, attention_mask (B, S), max_new_tokens () int64 -> tokens (B, N), log_probability (B,)``.

    The tokens are the best finished beam of every row, padded; ``log_probability`` is the sum over them.

    Args:
        weights: the checkpoint.
        precision: the number format.
        width: beams, at least 2.
        output_tokens: sorted ids of the tokens that the student may write; None: all.
        step_precision: another number format for the loop's body; None: ``precision``.
    """
    if width < 2:
        raise ValueError(f"a beam has at least width 2, not {width}")
    writer, ids, limit, states, mask = text_graph(weights, precision)
    graph = writer.graph
    batch = batch_of(writer, ids)
    cross = [_repeated(graph, batch, width, cache) for cache in cross_cache(writer, states)]
    wide_mask = _repeated(graph, batch, width, mask)
    body = graph.body("beam_")
    _write_step(
        Writer(body, weights, step_precision or precision),
        width,
        batch,
        limit,
        cross,
        wide_mask,
        output_tokens,
    )
    results = add_loop(graph, body, "search", limit, _first_state(writer, width, batch))
    best = graph.op("Gather", results[2], np.int64(0), axis=1)
    tokens = graph.op("Slice", best, axes(1), axes(2**31), axes(1))
    graph.output("tokens", INT64, ["batch", "new"], tokens)
    # The score is a mean over the beam's length, end-of-sequence included.
    is_end = graph.op("Cast", graph.op("Equal", tokens, np.int64(weights.eos_id)), to=INT64)
    ended_before = graph.op("Sub", graph.op("CumSum", is_end, np.int64(1)), is_end)
    counted = graph.op("Cast", graph.op("Equal", ended_before, np.int64(0)), to=FLOAT)
    lengths = graph.op("ReduceSum", counted, axes(1), keepdims=0)
    mean_score = graph.op("Gather", results[3], np.int64(0), axis=1)
    graph.output("log_probability", FLOAT, ["batch"], graph.op("Mul", mean_score, lengths))
    return graph.model("explainer_beam")


def _repeated(graph: Graph, batch: Value, width: int, x: Value) -> Value:
    """Repeat every row ``width`` times, rows of one input side by side."""
    shape = graph.op("Shape", x)
    tail = graph.op("Slice", shape, axes(1), axes(9), axes(0))
    lifted = graph.op("Expand", graph.op("Unsqueeze", x, axes(1)),
                      graph.op("Concat", batch, axes(width), tail, axis=0))  # fmt: skip
    return str(graph.op("Reshape", lifted, graph.op("Concat", axes(-1), tail, axis=0)))


def _picked(body: Graph, sequences: Value, index: Value) -> Value:
    """Gather whole sequences (B, W, length) by (B, n) of them."""
    return str(body.op("GatherND", sequences, body.op("Unsqueeze", index, axes(2)), batch_dims=1))


def _write_step(
    writer: Writer,
    width: int,
    batch: Value,
    limit: Value,
    cross: Sequence[Value],
    mask: Value,
    output_tokens: np.ndarray | None,
) -> None:
    """Write the loop's body: one token more for every running beam."""
    body, weights = writer.graph, writer.weights
    iteration = body.input("iteration", INT64, [])
    body.input("going", BOOL, [])
    running = body.input("running", INT64, ["batch", width, "length"])
    score = body.input("score", FLOAT, ["batch", width])
    finished = body.input("finished", INT64, ["batch", width, "length"])
    best_score = body.input("best_score", FLOAT, ["batch", width])
    hopeful = body.input("hopeful", BOOL, ["batch", 1])
    past = cache_inputs(body, weights, "rows", "past")
    last = body.op("Slice", running, axes(-1), axes(2**31), axes(2))
    token = body.op("Reshape", last, axes(-1, 1))
    normed, present = decode_step(writer, token, past, attend_cache(cross, mask))
    top, beam, token = _continuations(writer, width, normed, score, output_tokens)
    grown = body.op(
        "Concat", _picked(body, running, beam), body.op("Unsqueeze", token, axes(2)), axis=2
    )  # (B, 2W, n + 1)
    length = body.op("Add", iteration, np.int64(1))
    at_limit = body.op("Equal", length, limit)
    ended = body.op("Or", body.op("Equal", token, np.int64(weights.eos_id)), at_limit)

    still = body.op("Where", ended, body.op("Add", top, _NEVER), top)
    next_score, chosen = body.op("TopK", still, axes(width), outputs=2, axis=1)
    next_running = _picked(body, grown, chosen)
    source = body.op("GatherElements", beam, chosen, axis=1)  # (B, W)
    offset = body.op(
        "Mul", body.op("Range", np.int64(0), body.op("Squeeze", batch), np.int64(1)), np.int64(width)
    )
    rows = body.op("Reshape", body.op("Add", source, body.op("Unsqueeze", offset, axes(1))), axes(-1))

    divisor = body.op("Cast", length, to=FLOAT)
    candidate = _candidates(body, width, ended, hopeful, body.op("Div", top, divisor))
    lengthened = body.op("Pad", finished, axes(0, 0, 0, 0, 0, 1), np.int64(weights.pad_id))
    pool = body.op("Concat", lengthened, grown, axis=1)
    next_best, kept = body.op(
        "TopK", body.op("Concat", best_score, candidate, axis=1), axes(width), outputs=2, axis=1
    )
    next_finished = _picked(body, pool, kept)

    hope = body.op("Div", body.op("ReduceMax", next_score, axes(1), keepdims=1), divisor)
    worst = body.op("ReduceMin", next_best, axes(1), keepdims=1)
    # A row that cannot improve takes no more candidates, however long the other rows run.
    still_hopeful = body.op("And", hopeful, body.op("Greater", hope, worst))
    improvable = body.op("ReduceMax", body.op("Cast", still_hopeful, to=6), keepdims=0)
    not_over = body.op("Not", at_limit)
    body.output("still_going", BOOL, [], body.op("And", body.op("Cast", improvable, to=BOOL), not_over))
    body.output("next_running", INT64, ["batch", width, "longer"], next_running)
    body.output("next_score", FLOAT, ["batch", width], next_score)
    body.output("next_finished", INT64, ["batch", width, "longer"], next_finished)
    body.output("next_best", FLOAT, ["batch", width], next_best)
    body.output("next_hopeful", BOOL, ["batch", 1], still_hopeful)
    caches = (body.op("Gather", cache, rows, axis=0) for cache in present)
    cache_outputs(body, weights, "rows", "now", caches)


def _continuations(
    writer: Writer, width: int, normed: Value, score: Value, output_tokens: np.ndarray | None
) -> tuple[Value, Value, Value]:
    """Return scores, beams and tokens (B, 2W) of the best continuations of all beams, best first."""
    body, weights = writer.graph, writer.weights
    logits = writer.logits(normed, output_tokens)
    n_tokens = weights.head.shape[0] if output_tokens is None else len(output_tokens)
    log_p = body.op("LogSoftmax", logits, axis=-1)
    log_p = body.op("Reshape", log_p, axes(-1, width, n_tokens))
    total = body.op(
        "Reshape", body.op("Add", log_p, body.op("Unsqueeze", score, axes(2))), axes(0, width * n_tokens)
    )
    top, where = body.op("TopK", total, axes(2 * width), outputs=2, axis=1)
    beam, token = body.op("Div", where, np.int64(n_tokens)), body.op("Mod", where, np.int64(n_tokens))
    if output_tokens is not None:
        token = body.op("Gather", np.asarray(output_tokens, np.int64), token)
    return top, beam, token


def _candidates(body: Graph, width: int, ended: Value, hopeful: Value, mean: Value) -> Value:
    """Return the scores (B, 2W) of continuations that end now, and next to nothing for the others."""
    among_first = np.arange(2 * width)[None] < width
    allowed = body.op("And", body.op("And", ended, among_first), hopeful)
    return str(body.op("Where", allowed, mean, body.op("Add", mean, _NEVER)))


def _first_state(writer: Writer, width: int, batch: Value) -> list[Value]:
    """Return what the loop carries into its first step: one beam of the start token, and no finished one."""
    graph, weights = writer.graph, writer.weights
    heads, kv = weights.n_heads, weights.d_kv
    first = np.full((1, width, 1), weights.start_id, np.int64)
    start = expand_batch(writer, graph.constant(first), batch, (width, 1))
    only_one = np.array([[0.0] + [float(_NEVER)] * (width - 1)], np.float32)
    empty = graph.op(
        "Expand", np.zeros((1, heads, 0, kv), np.float32),
        graph.op("Concat", graph.op("Mul", batch, axes(width)), axes(heads, 0, kv), axis=0),
    )  # fmt: skip
    none_yet = expand_batch(writer, graph.constant(np.full((1, width), _NEVER, np.float32)), batch, (width,))
    hopes = expand_batch(writer, graph.constant([[True]], np.bool_), batch, (1,))
    scores = expand_batch(writer, graph.constant(only_one), batch, (width,))
    return [start, scores, start, none_yet, hopes, *[empty] * (2 * weights.n_decoder_layers)]
