"""Beam search of a fixed width in one graph, with the bookkeeping of ``transformers``' ``generate``.

Width w keeps w running beams and the w best finished ones a row. Of the 2w best continuations, those among the first
w that end become candidates for the finished ones, with the mean log-probability of their tokens as score; the best w
that do not end run on. The search stops when no row's best running beam could still beat its worst finished one, or
at the limit, where what runs counts as finished.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from sbs_edge.export.graphs.blocks import Writer
from sbs_edge.export.graphs.builder import BOOL, FLOAT, INT64, Graph, Value
from sbs_edge.export.graphs.decoder import attend_cache, cross_cache, decode_step
from sbs_edge.export.graphs.encoder import batch_of, encode, expand_batch
from sbs_edge.export.graphs.weights import T5Weights
from sbs_edge.export.quant.precision import Precision

__all__ = ["build_beam_generator"]

_NEVER = np.float32(-1e9)


def _axes(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def build_beam_generator(
    weights: T5Weights,
    precision: Precision,
    width: int,
    output_tokens: np.ndarray | None = None,
    step_precision: Precision | None = None,
) -> onnx.ModelProto:
    """Write ``input_ids, attention_mask (B, S), max_new_tokens () int64 -> tokens (B, N), log_probability (B,)``.

    The best finished beam of every row, padded; ``log_probability`` is the sum over its tokens.

    Args:
        weights: the checkpoint.
        precision: the number format.
        width: beams, at least 2.
        output_tokens: sorted token ids the student may write; None: all.
        step_precision: another number format for the loop's body; None: ``precision``.
    """
    if width < 2:
        raise ValueError(f"a beam has at least width 2, not {width}")
    step_precision = step_precision or precision
    graph = Graph()
    ids = graph.input("input_ids", INT64, ["batch", "source"])
    attention = graph.input("attention_mask", INT64, ["batch", "source"])
    limit = graph.input("max_new_tokens", INT64, [])
    writer = Writer(graph, weights, precision)
    states, mask = encode(writer, ids, attention)
    batch = batch_of(writer, ids)

    def repeated(x: Value) -> Value:
        """Repeat every row ``width`` times, rows of one input side by side."""
        shape = graph.op("Shape", x)
        tail = graph.op("Slice", shape, _axes(1), _axes(9), _axes(0))
        lifted = graph.op("Expand", graph.op("Unsqueeze", x, _axes(1)),
                          graph.op("Concat", batch, _axes(width), tail, axis=0))  # fmt: skip
        return str(graph.op("Reshape", lifted, graph.op("Concat", _axes(-1), tail, axis=0)))

    cross = [repeated(cache) for cache in cross_cache(writer, states)]
    wide_mask = repeated(mask)

    body = graph.body("beam_")
    iteration = body.input("iteration", INT64, [])
    body.input("going", BOOL, [])
    running = body.input("running", INT64, ["batch", width, "length"])
    score = body.input("score", FLOAT, ["batch", width])
    finished = body.input("finished", INT64, ["batch", width, "length"])
    best_score = body.input("best_score", FLOAT, ["batch", width])
    hopeful = body.input("hopeful", BOOL, ["batch", 1])
    heads, kv = weights.n_heads, weights.d_kv
    past = [
        body.input(f"past_{i}", FLOAT, ["rows", heads, "past", kv])
        for i in range(2 * weights.n_decoder_layers)
    ]
    last = body.op("Slice", running, _axes(-1), _axes(2**31), _axes(2))
    inner = Writer(body, weights, step_precision)
    token = body.op("Reshape", last, _axes(-1, 1))
    normed, present = decode_step(inner, token, past, attend_cache(cross, wide_mask))
    logits = inner.logits(normed, output_tokens)
    n_tokens = weights.head.shape[0] if output_tokens is None else len(output_tokens)
    log_p = body.op("LogSoftmax", logits, axis=-1)
    log_p = body.op("Reshape", log_p, _axes(-1, width, n_tokens))
    total = body.op(
        "Reshape", body.op("Add", log_p, body.op("Unsqueeze", score, _axes(2))), _axes(0, width * n_tokens)
    )
    top, where = body.op("TopK", total, _axes(2 * width), outputs=2, axis=1)
    beam, token = body.op("Div", where, np.int64(n_tokens)), body.op("Mod", where, np.int64(n_tokens))
    if output_tokens is not None:
        token = body.op("Gather", np.asarray(output_tokens, np.int64), token)

    def pick(sequences: Value, index: Value) -> Value:
        """Gather whole sequences (B, W, length) by (B, n) of them."""
        return str(body.op("GatherND", sequences, body.op("Unsqueeze", index, _axes(2)), batch_dims=1))

    grown = body.op(
        "Concat", pick(running, beam), body.op("Unsqueeze", token, _axes(2)), axis=2
    )  # (B, 2W, n + 1)
    length = body.op("Add", iteration, np.int64(1))
    at_limit = body.op("Equal", length, limit)
    ends = body.op("Or", body.op("Equal", token, np.int64(weights.eos_id)), at_limit)

    still = body.op("Where", ends, body.op("Add", top, _NEVER), top)
    next_score, chosen = body.op("TopK", still, _axes(width), outputs=2, axis=1)
    next_running = pick(grown, chosen)
    source = body.op("GatherElements", beam, chosen, axis=1)  # (B, W)
    offset = body.op(
        "Mul", body.op("Range", np.int64(0), body.op("Squeeze", batch), np.int64(1)), np.int64(width)
    )
    rows = body.op("Reshape", body.op("Add", source, body.op("Unsqueeze", offset, _axes(1))), _axes(-1))

    divisor = body.op("Cast", length, to=FLOAT)
    among_first = np.arange(2 * width)[None] < width
    mean = body.op("Div", top, divisor)
    candidate = body.op(
        "Where",
        body.op("And", body.op("And", ends, among_first), hopeful),
        mean,
        body.op("Add", mean, _NEVER),
    )
    lengthened = body.op("Pad", finished, _axes(0, 0, 0, 0, 0, 1), np.int64(weights.pad_id))
    pool = body.op("Concat", lengthened, grown, axis=1)
    next_best, kept = body.op(
        "TopK", body.op("Concat", best_score, candidate, axis=1), _axes(width), outputs=2, axis=1
    )
    next_finished = pick(pool, kept)

    hope = body.op("Div", body.op("ReduceMax", next_score, _axes(1), keepdims=1), divisor)
    worst = body.op("ReduceMin", next_best, _axes(1), keepdims=1)
    # A row that cannot improve takes no candidate any more, however long the others of its batch run.
    still_hopeful = body.op("And", hopeful, body.op("Greater", hope, worst))
    improvable = body.op("ReduceMax", body.op("Cast", still_hopeful, to=6), keepdims=0)
    not_over = body.op("Not", at_limit)
    body.output("still_going", BOOL, [], body.op("And", body.op("Cast", improvable, to=BOOL), not_over))
    body.output("next_running", INT64, ["batch", width, "longer"], next_running)
    body.output("next_score", FLOAT, ["batch", width], next_score)
    body.output("next_finished", INT64, ["batch", width, "longer"], next_finished)
    body.output("next_best", FLOAT, ["batch", width], next_best)
    body.output("next_hopeful", BOOL, ["batch", 1], still_hopeful)
    for index, cache in enumerate(present):
        body.output(
            f"present_{index}", FLOAT, ["rows", heads, "now", kv], body.op("Gather", cache, rows, axis=0)
        )

    first = np.full((1, width, 1), weights.start_id, np.int64)
    start = expand_batch(writer, graph.constant(first), batch, (width, 1))
    only_one = np.array([[0.0] + [float(_NEVER)] * (width - 1)], np.float32)
    empty = graph.op(
        "Expand", np.zeros((1, heads, 0, kv), np.float32),
        graph.op("Concat", graph.op("Mul", batch, _axes(width)), _axes(heads, 0, kv), axis=0),
    )  # fmt: skip
    none_yet = expand_batch(writer, graph.constant(np.full((1, width), _NEVER, np.float32)), batch, (width,))
    hopes = expand_batch(writer, graph.constant([[True]], np.bool_), batch, (1,))
    results = [f"loop_{i}" for i in range(5 + len(past))]
    graph.nodes.append(
        helper.make_node(
            "Loop",
            [
                limit,
                "",
                start,
                expand_batch(writer, graph.constant(only_one), batch, (width,)),
                start,
                none_yet,
                hopes,
            ]
            + [empty] * len(past),
            results,
            body=body.as_proto("search"),
        )
    )
    best = graph.op("Gather", results[2], np.int64(0), axis=1)
    tokens = graph.op("Slice", best, _axes(1), _axes(2**31), _axes(1))
    graph.output("tokens", INT64, ["batch", "new"], tokens)
    # The score is a mean over the beam's length, end-of-sequence included.
    is_end = graph.op("Cast", graph.op("Equal", tokens, np.int64(weights.eos_id)), to=INT64)
    ended_before = graph.op("Sub", graph.op("CumSum", is_end, np.int64(1)), is_end)
    counted = graph.op("Cast", graph.op("Equal", ended_before, np.int64(0)), to=FLOAT)
    lengths = graph.op("ReduceSum", counted, _axes(1), keepdims=0)
    mean_score = graph.op("Gather", results[3], np.int64(0), axis=1)
    graph.output("log_probability", FLOAT, ["batch"], graph.op("Mul", mean_score, lengths))
    return graph.model("explainer_beam")
