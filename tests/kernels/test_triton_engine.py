"""The Triton tiles under Triton's interpreter: values, gradients, hits and how training uses them.

The interpreter multiplies bfloat16 wrongly, so float32 and float16 stand for all: the kernels differ in
the type of loads and stores only. Its blocks are 16 x 32 x 16, so small shapes already have many. Every
test of values runs in both orders: slices of the vocabulary, and blocks of 16 rows.
"""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sbs_edge.kernels import chunks, tile_table
from sbs_edge.kernels.cross_entropy import fused_linear_cross_entropy

SHAPES = [
    (1, 8, 5),  # everything smaller than one block
    (19, 16, 101),  # rows and vocabulary end inside a block; a strip a tile
    (34, 40, 96),  # a whole number of vocabulary tiles; the width ends inside a block
    (40, 32, 600),  # several tiles a strip, several slices of the vocabulary
    (12, 16, 384),  # ByT5's vocabulary
]
OPTIONS = [
    {},
    {"label_smoothing": 0.1, "z_loss": 1e-2, "bias": True},
    {"softcap": 3.0, "logit_scale": 0.25, "bias": True},
    {"row_weights": True, "denominators": True, "logit_scale": 2.0},
]


@pytest.fixture(params=["vocab_chunks", "row_chunks"])
def order(request, monkeypatch):
    monkeypatch.setattr(chunks, "ROW_STEP", 16)
    with chunks.use(request.param):
        yield request.param


def _case(n, d, v, dtype, options, segments):
    """Inputs of which every second target is the winner, so that hits are counted, and options."""
    torch.manual_seed(n + d + v)
    hidden, weight = torch.randn(n, d).to(dtype), torch.randn(v, d).to(dtype)
    targets = torch.randint(0, v, (n,))
    targets[::2] = (hidden.double() @ weight.double().t()).argmax(dim=1)[::2]
    targets[1::3] = -100
    given = dict(options)
    if given.pop("bias", False):
        given["bias"] = torch.randn(v).to(dtype) * 0.1
    if given.pop("row_weights", False):
        given["row_weights"] = torch.rand(n) * (torch.arange(n) % 4 != 0)
    if given.pop("denominators", False):
        given["denominators"] = torch.rand(segments) + 0.5
    # The last of three segments stays empty.
    ids = torch.arange(n) % (2 if segments == 3 else segments)
    given |= {"segment_ids": ids, "n_segments": segments, "segment_weights": [1.0, 0.3, 2.0][:segments]}
    return hidden, weight, targets, given


def _run(engine, hidden, weight, targets, given, kind, weight_kind=None, scale=3.0):
    """[total, losses, dhidden, dweight, dbias] in float64, counts and hits."""
    tensors = [hidden.to(kind).requires_grad_(), weight.to(weight_kind or kind).requires_grad_()]
    given = dict(given)
    if "bias" in given:
        given["bias"] = given["bias"].to(kind).requires_grad_()
        tensors.append(given["bias"])
    loss = fused_linear_cross_entropy(*tensors[:2], targets, engine=engine, workspace_mb=1e-6, **given)
    grads = torch.autograd.grad(loss.total * scale, tensors)
    values = [loss.total.detach().double(), loss.losses.double(), *(g.double() / scale for g in grads)]
    return values, (loss.counts.tolist(), loss.correct.tolist())


def _assert_twice(exact, plain, mine, dtype):
    for right, theirs, ours in zip(exact, plain, mine, strict=True):
        floor = torch.finfo(dtype).eps * right.norm()  # the yardstick may be exact by luck
        assert (ours - right).norm() <= 2 * torch.maximum((theirs - right).norm(), floor)


@pytest.mark.interpreted
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
@pytest.mark.parametrize("segments", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_twice_that_of_plain_torch(order, shape, dtype, segments, options):
    if order == "row_chunks" and "softcap" in options:
        options = {**options, "softcap": 0.0}  # refused, see below
    case = _case(*shape, dtype, options, segments)
    exact, counted = _run("reference", *case, torch.float64)
    plain, _ = _run("reference", *case, dtype)
    mine, found = _run("triton", *case, dtype)
    _assert_twice(exact, plain, mine, dtype)
    assert found == counted
    assert shape[0] < 12 or 0 < sum(found[1]) < sum(found[0])


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 4.0])  # flat; two of three rows sure; losses near rounding
def test_flat_and_confident_rows_are_as_exact(order, sharpness, dtype):
    torch.manual_seed(0)
    weight = torch.randn(101, 32).to(dtype)
    targets = torch.arange(60) % 101
    hidden = (sharpness * (weight[targets] / 4 + 0.1 * torch.randn(60, 32))).to(dtype)
    case = (hidden, weight, targets, {})
    exact, counted = _run("reference", *case, torch.float64)
    plain, _ = _run("reference", *case, dtype)
    mine, found = _run("triton", *case, dtype)
    _assert_twice(exact, plain, mine, dtype)
    assert found == counted
    if sharpness == 4.0:
        assert exact[0] < 1e-3
        assert found[1] == [60]


@pytest.mark.interpreted
@pytest.mark.parametrize("scale", [1.0, 65536.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mixed_precision_casts_slices_of_the_weight_and_bears_any_loss_scale(order, shape, scale):
    case = _case(*shape, torch.float16, {"label_smoothing": 0.1}, 2)
    exact, counted = _run("reference", *case, torch.float64)
    plain, _ = _run("reference", *case, torch.float16, torch.float32)
    with tile_table.tuned(cast_bytes=64 * shape[1] * 2):  # several slices in the forward pass
        mine, found = _run("triton", *case, torch.float16, torch.float32, scale=scale)
    _assert_twice(exact, plain, mine, torch.float16)
    assert found == counted


@pytest.mark.interpreted
def test_small_factors_do_not_underflow_in_float16(order):
    """Rows a million times lighter than others keep the relative precision of their own gradient."""
    case = _case(19, 16, 101, torch.float16, {}, 1)
    case[3]["row_weights"] = torch.where(torch.arange(19) % 2 == 0, 1.0, 1e-6)
    exact, _ = _run("reference", *case, torch.float64)
    mine, _ = _run("triton", *case, torch.float16, scale=2.0**20)
    light = (torch.arange(19) % 2 == 1) & (case[2] != -100)
    error = (mine[2] - exact[2])[light].norm() / exact[2][light].norm()
    assert error <= 2 * torch.finfo(torch.float16).eps


@pytest.mark.interpreted
@pytest.mark.parametrize("n", [0, 4])
def test_without_a_valid_row_everything_is_zero(order, n):
    hidden, weight = torch.randn(n, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    bias = torch.zeros(11, requires_grad=True)
    result = fused_linear_cross_entropy(
        hidden, weight, torch.full((n,), -100), bias=bias, n_segments=2, engine="triton"
    )
    result.total.backward()
    assert result.total.item() == 0
    assert result.losses.tolist() == result.counts.tolist() == result.correct.tolist() == [0, 0]
    assert not any(x.grad.any() for x in (hidden, weight, bias))


@pytest.mark.interpreted
@pytest.mark.parametrize(
    "twin", [5, 40, 99]
)  # of column 3: in its tile, in its strip's next, in another strip
def test_ties_go_to_the_first_column_as_argmax_has_it(order, twin):
    torch.manual_seed(0)
    weight = torch.randn(101, 16)
    weight[twin] = weight[3] = 5 * weight[3]
    hidden = weight[[3, 3, 3]].clone()
    hidden[2] = 0  # every column ties
    targets = torch.tensor([3, twin, 3])
    result = fused_linear_cross_entropy(
        hidden, weight, targets, segment_ids=torch.arange(3), n_segments=3, engine="triton"
    )
    assert (weight @ hidden[0]).argmax() == 3
    assert result.correct.tolist() == [1, 0, 0]
    zero = fused_linear_cross_entropy(hidden[2:], weight, torch.tensor([0]), engine="triton")
    assert zero.correct.tolist() == [1]


@pytest.mark.interpreted
def test_classes_banned_by_an_infinite_bias_get_no_probability(order):
    hidden, weight, targets, given = _case(19, 16, 101, torch.float32, {}, 1)
    given["bias"] = torch.where(torch.arange(101) < 64, -torch.inf, 0.0)
    targets = torch.where(targets < 0, targets, 64 + targets % 37)
    exact, counted = _run("reference", hidden, weight, targets, given, torch.float64)
    mine, found = _run("triton", hidden, weight, targets, given, torch.float32)
    for right, ours in zip(exact, mine, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-6)
    assert found == counted


@pytest.mark.interpreted
def test_repetition_strides_and_given_indices_change_no_bit(order):
    case = _case(34, 40, 96, torch.float16, {"label_smoothing": 0.1}, 2)
    hidden, weight, targets, given = case
    first, _ = _run("triton", *case, torch.float16)
    strided = hidden.t().contiguous().t()
    wide = torch.randn(96, 80).half()
    wide[:, ::2] = weight
    known = given | {"valid_indices": (targets != -100).nonzero().squeeze(1)}
    for again in (
        _run("triton", *case, torch.float16),
        _run("triton", strided, wide[:, ::2], targets, known, torch.float16),
    ):
        assert all(torch.equal(a, b) for a, b in zip(first, again[0], strict=True))


@pytest.mark.interpreted
def test_offsets_reach_beyond_two_to_the_31_elements(order):
    """Rows that lie 2^31 elements apart, in memory that is reserved and not touched."""
    torch.manual_seed(0)
    far, near = torch.empty(2**31 + 32, dtype=torch.float16), 2**31 // 32
    hidden, weight = torch.randn(2, 16).half(), torch.randn(40, 16).half()
    apart_hidden = far.as_strided((2, 16), (2**31, 1))
    apart_hidden.copy_(hidden)
    long = torch.empty(near * 39 + 16, dtype=torch.float16)
    apart_weight = long.as_strided((40, 16), (near, 1))
    apart_weight.copy_(weight)
    targets = torch.tensor([39, 2])
    grads = []
    for h, w in ((hidden, weight), (apart_hidden, apart_weight)):
        tensors = (h.detach().requires_grad_(), w.detach().requires_grad_())
        total = fused_linear_cross_entropy(*tensors, targets, engine="triton").total
        grads.append((total, *torch.autograd.grad(total, tensors)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.interpreted
def test_frozen_compiled_checkpointed_repeated_and_bad(order):
    hidden, weight, targets, given = _case(19, 16, 101, torch.float32, {}, 2)
    hidden.requires_grad_()
    weight.requires_grad_()

    def loss(h, w):
        return fused_linear_cross_entropy(h, w, targets, engine="triton", **given).total

    def grads(total, *tensors):
        return torch.autograd.grad(total, tensors, retain_graph=True)

    total = loss(hidden, weight)
    plain = grads(total, hidden, weight)
    assert all(torch.equal(a, b) for a, b in zip(grads(total, hidden, weight), plain, strict=True))
    assert torch.equal(grads(loss(hidden, weight.detach()), hidden)[0], plain[0])
    assert torch.equal(grads(loss(hidden.detach(), weight), weight)[0], plain[1])
    with torch.no_grad():
        assert torch.equal(loss(hidden, weight), total)
    again = checkpoint(loss, hidden, weight, use_reentrant=False)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden, weight)
    twice = loss(hidden, weight) + loss(hidden, weight)
    assert torch.equal(compiled, total)
    for other, factor in ((again, 1), (compiled, 1), (twice, 2)):
        for a, b in zip(grads(other, hidden, weight), plain, strict=True):
            torch.testing.assert_close(a, b * factor, rtol=0 if factor == 1 else 1e-6, atol=0)
    with torch.autocast("cpu", dtype=torch.float16):
        cast = grads(loss(hidden, weight), hidden, weight)
    rounded = hidden.detach().half().requires_grad_()
    assert torch.equal(cast[1], grads(loss(rounded, weight), weight)[0])
    assert cast[0].dtype == torch.float32
    with pytest.raises(RuntimeError, match="float64 needs engine='torch'"):
        loss(hidden.double(), weight.double())
    targets[6] = 101
    assert loss(hidden, weight).isnan()


@pytest.mark.interpreted
def test_blocks_of_rows_refuse_a_soft_cap():
    hidden, weight, targets, _ = _case(19, 16, 101, torch.float32, {}, 1)
    hidden.requires_grad_()
    with chunks.use("row_chunks"), pytest.raises(RuntimeError, match="use chunks of the vocabulary"):
        fused_linear_cross_entropy(hidden, weight, targets, softcap=3.0, engine="triton")
