"""Slices of the vocabulary or blocks of rows: the rule's memory, its monotony, and values on both sides of it."""

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sbs_edge.kernels import chunks
from sbs_edge.kernels.cross_entropy import fused_linear_cross_entropy

# T5's and mT5's vocabulary, ByT5's, and a size that no tile divides.
HEADS = [(32128, 512), (32128, 768), (32128, 1024), (250112, 768), (384, 1472), (32101, 640)]
TYPES = [(2, 2), (2, 4), (4, 4)]


@pytest.mark.parametrize("types", TYPES, ids=["16 bits", "master weight", "float32"])
@pytest.mark.parametrize("sizes", HEADS, ids=str)
def test_chunks_of_rows_are_taken_from_one_number_on_where_their_memory_is_worth_it(sizes, types):
    head = chunks.Head(*sizes, *types)
    least = chunks.switch_rows(*head)
    assert 1 < least < chunks.NEVER
    for n in (least - 1, least // 2, least, least + 1, 2 * least, 8 * least):
        columns = chunks.by_columns(n, head, 0.0)
        budget = chunks.budget_of(n, head, 0.0)
        rows = chunks.by_rows(n, head, budget)
        if n >= least:
            lean = rows.workspace <= columns.workspace
            assert rows.seconds < columns.seconds * (1.0 if lean else 0.9)
            assert lean or rows.workspace <= 256 << 20
            assert rows.span >= min(n, chunks.LEAST_ROWS if lean else 1024)
        step = chunks.plan_rows_at_once(n, head, budget)
        assert step <= max(rows.span, chunks.ROW_STEP)
        assert -(-n // step) == -(-n // rows.span), "even blocks are not more blocks"


def test_the_default_memory_of_many_rows_and_few():
    """T5's vocabulary in bfloat16: 16384 rows may take 256 MiB, 4096 keep to what chunks of the vocabulary need."""
    head = chunks.Head(32128, 768, 2, 2)
    assert 4096 < chunks.switch_rows(*head) <= 16384
    many = chunks.by_rows(16384, head, chunks.budget_of(16384, head, 0.0))
    assert 200 << 20 < many.workspace <= 256 << 20
    assert chunks.by_columns(4096, head, 0.0).workspace < 80 << 20
    assert chunks.switch_rows(250112, 768, 2, 2) > 65536  # its dW alone would take 733 MiB more


@pytest.mark.parametrize(
    ("width", "processors", "span"), [(768, 132, 5632), (512, 132, 8448), (1024, 108, 3328)]
)
def test_a_slice_of_dw_divides_into_whole_waves(width, processors, span):
    for wanted in (span, span + 255, 2 * span + 100):
        taken = chunks.whole_waves(wanted, width, processors)
        assert taken == wanted // span * span
        assert taken // 256 * -(-width // 128) % processors < -(-width // 128) or taken == span * (
            taken // span
        )
    assert chunks.whole_waves(span - 1, width, processors) == span - 1


@pytest.mark.parametrize("workspace_mb", [256.0, 512.0])
@pytest.mark.parametrize("types", TYPES, ids=str)
def test_a_workspace_is_kept_by_blocks_where_slices_cannot(types, workspace_mb):
    head = chunks.Head(32128, 768, *types)
    n, budget = 65536, workspace_mb * 2**20
    assert n >= chunks.switch_rows(*head, workspace_mb)
    assert chunks.by_rows(n, head, budget).workspace <= budget
    if workspace_mb == 256.0:  # dX in float32 alone takes 192 MiB, the gathered rows 96 or 192
        assert chunks.by_columns(n, head, workspace_mb).workspace > budget


def test_the_model_counts_what_the_orders_move():
    """65536 rows of T5's vocabulary: two operations in eight fewer, and a third of the accumulators' traffic."""
    head = chunks.Head(32128, 768, 2, 2)
    columns = chunks.by_columns(65536, head, 0.0)
    rows = chunks.by_rows(65536, head, columns.workspace)
    assert rows.flops / columns.flops == 0.75
    once = 65536 * 32128 * 2  # bytes of all scores
    blocks, slices = 65536 / rows.span, 32128 / columns.span
    assert rows.traffic - 5 * once == pytest.approx(32128 * 768 * 12 * blocks, rel=0.3)
    assert columns.traffic - 3 * once == pytest.approx(65536 * 768 * 12 * slices, rel=0.3)
    assert rows.traffic - 5 * once < 0.35 * (columns.traffic - 3 * once)


def test_a_soft_cap_never_switches_and_an_order_can_be_asked_for():
    assert chunks.switch_rows(384, 1472, 2, 2, capped=True) == chunks.NEVER
    with chunks.use("row_chunks"), chunks.use("vocab_chunks"):
        assert chunks.asked() == "vocab_chunks"
    assert chunks.asked() == ""
    with pytest.raises(ValueError, match="'vocab_chunks' or 'row_chunks'"), chunks.use("both"):
        pass


def _gradients(engine, n, d, v, dtype, seed, workspace_mb=None, **options):
    torch.manual_seed(seed)
    tensors = [torch.randn(n, d).half(), torch.randn(v, d).half(), torch.randn(v).half()]
    targets = torch.randint(0, v, (n,))
    targets[torch.rand(n) < 0.3] = -100
    h, w, b = (x.to(dtype).requires_grad_() for x in tensors)
    loss = fused_linear_cross_entropy(
        h, w, targets, bias=b, segment_ids=torch.arange(n) % 2, n_segments=2, segment_weights=(1.0, 0.3),
        engine=engine, workspace_mb=workspace_mb, **options,
    )  # fmt: skip
    grads = torch.autograd.grad(loss.total * 3.0, (h, w, b))
    return [loss.total.detach().double(), *(g.double() for g in grads)], loss.correct.tolist()


@pytest.mark.interpreted
@pytest.mark.long
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    d=st.integers(1, 20), v=st.integers(2, 70), offset=st.integers(-6, 6), seed=st.integers(0, 99),
    smoothing=st.sampled_from((0.0, 0.2)), z_loss=st.sampled_from((0.0, 0.01)),
    scale=st.sampled_from((1.0, 0.25)), half=st.booleans(),
)  # fmt: skip
def test_across_the_switch(d, v, offset, seed, smoothing, z_loss, scale, half):
    dtype = torch.float16 if half else torch.float32
    workspace = 0.002  # MiB: with rows in steps of 16 the switch lies within a few dozen rows
    before, chunks.ROW_STEP = chunks.ROW_STEP, 16
    chunks._switch.cache_clear()
    try:
        least = chunks.switch_rows(v, d, dtype.itemsize, dtype.itemsize, workspace)
        n = max(1, min(least, 40) + offset)
        options = {"label_smoothing": smoothing, "z_loss": z_loss, "logit_scale": scale}
        exact, hits = _gradients("reference", n, d, v, torch.float64, seed, **options)
        plain, _ = _gradients("reference", n, d, v, dtype, seed, **options)
        mine, found = _gradients("triton", n, d, v, dtype, seed, workspace, **options)
        assert found == hits
        for right, theirs, ours in zip(exact, plain, mine, strict=True):
            floor = torch.finfo(dtype).eps * right.norm() + 1e-12
            assert (ours - right).norm() <= 2 * torch.maximum((theirs - right).norm(), floor)
    finally:
        chunks.ROW_STEP = before
        chunks._switch.cache_clear()


@pytest.mark.interpreted
@pytest.mark.long
@pytest.mark.parametrize("order", ["row_chunks", "vocab_chunks", None])
def test_compiled_with_a_number_of_rows_that_changes(order):
    torch.manual_seed(0)
    weight = torch.randn(101, 16, requires_grad=True)

    def loss(hidden, targets):
        return fused_linear_cross_entropy(hidden, weight, targets, engine="triton").total

    def valid_only(hidden, targets):  # the number of rows is known at run time only
        kept = (targets != -100).nonzero().squeeze(1)
        return loss(hidden[kept], targets[kept])

    chosen = contextlib.nullcontext() if order is None else chunks.use(order)
    with chosen, torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for function, dynamic in ((loss, True), (loss, None), (valid_only, None)):
            torch._dynamo.reset()
            compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
            for n in (24, 37, 50):
                hidden, targets = torch.randn(n, 16, requires_grad=True), torch.randint(0, 101, (n,))
                targets[::3] = -100
                results = [f(hidden, targets) for f in (compiled, function)]
                grads = [torch.autograd.grad(x, (hidden, weight)) for x in results]
                for a, b in zip(*grads, strict=True):
                    torch.testing.assert_close(a, b)
