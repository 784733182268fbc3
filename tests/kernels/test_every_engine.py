"""What holds in every engine: layouts of the inputs, confident rows, factors that are no numbers, the formula.

The engines for GPUs run in Triton's interpreter, in a process of their own, by the same tests.
"""

import contextlib
import math
import os

import pytest
import torch
import torch.nn.functional as F

from sbs_edge.kernels import chunks, torch_engine
from sbs_edge.kernels.cross_entropy import fused_linear_cross_entropy
from sbs_edge.kernels.plan import Inputs, Need, Options, plan_rows, segment_means

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ENGINES = ["cublas", "triton-vocab_chunks", "triton-row_chunks"] if INTERPRETED else ["torch", "reference"]
SLICED = [engine for engine in ENGINES if engine != "reference"]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(chunks, "ROW_STEP", 16)


def _loss(engine, *args, **options):
    name, _, order = engine.partition("-")
    if options.get("softcap"):  # blocks of rows refuse it
        order = "vocab_chunks"
    with chunks.use(order) if order else contextlib.nullcontext():
        return fused_linear_cross_entropy(*args, engine=name, **options)


def _strided(x):
    return torch.stack([x, torch.ones_like(x)], dim=-1)[..., 0]


def _expanded(x):
    return x[:1].expand(x.shape)


def _transposed(x):
    return x.t().contiguous().t()


def _int32(x):
    return x.to(torch.int32)


FLOATS, COUNTS = ("hidden", "weight", "bias"), ("targets", "segment_ids", "row_weights", "denominators")
LAYOUTS = [
    *((name, _strided) for name in (*FLOATS, *COUNTS, "valid_indices", "segment_weights")),
    *((name, _expanded) for name in (*FLOATS, *COUNTS)),
    *((name, _transposed) for name in FLOATS[:2]),
    *((name, _int32) for name in (*COUNTS, "valid_indices")),
]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("name", "layout"), LAYOUTS, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_the_layout_of_an_input_changes_nothing(name, layout, engine):
    torch.manual_seed(0)
    n, d, v = 19, 16, 70
    given = {
        "hidden": torch.randn(n, d), "weight": torch.randn(v, d), "bias": torch.randn(v),
        "targets": torch.randint(0, v, (n,)), "segment_ids": torch.randint(0, 2, (n,)), "n_segments": 2,
        "row_weights": torch.randint(1, 4, (n,)).float(), "denominators": torch.tensor([7.0, 9.0]),
        "segment_weights": torch.tensor([1.0, 0.3]),
    }  # fmt: skip
    given["targets"][::3] = -100
    if layout is _expanded and name == "targets":
        given["targets"] = given["targets"].flip(0)  # the first is a class
    given[name] = given.get(name, torch.empty(0))
    given["valid_indices"] = (given["targets"] != -100).nonzero().squeeze(1)
    laid = layout(given[name])
    if name == "targets":
        given["valid_indices"] = (laid != -100).nonzero().squeeze(1)
    plain = {**given, name: laid.to(given[name].dtype).contiguous()}
    assert layout is _int32 or not laid.is_contiguous()

    def run(case, engine, kind=torch.float32):
        case = {k: x.to(kind) if torch.is_tensor(x) and x.is_floating_point() else x for k, x in case.items()}
        tensors = [case[each].detach().requires_grad_() for each in FLOATS]
        rest = {key: x for key, x in case.items() if key not in (*FLOATS, "targets")}
        loss = _loss(engine, *tensors[:2], case["targets"], bias=tensors[2], workspace_mb=0.005, **rest)
        return [loss.total, loss.losses, loss.counts, loss.correct, *torch.autograd.grad(loss.total, tensors)]

    for right, ours in zip(
        run(plain, "reference", torch.float64), run({**given, name: laid}, engine), strict=True
    ):
        torch.testing.assert_close(ours, right, check_dtype=False, rtol=2e-5, atol=2e-6)


def _plain(hidden, weight, targets, bias=None, logit_scale=1.0, softcap=0.0, label_smoothing=0.0):
    """(total, losses of the rows) by torch's own cross-entropy on full logits."""
    logits = hidden @ weight.t() * logit_scale
    if bias is not None:
        logits = logits + bias
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
    return losses.mean(), losses


def _errors(engine, hidden, weight, targets, kind=torch.float32, **options):
    """Norms of (error, plain torch's, what is exact) of the rows' losses, dhidden and dweight."""
    n = len(targets)

    def ours(h, w):
        each = {"segment_ids": torch.arange(n), "n_segments": n, "segment_weights": [1 / n] * n}
        return _loss(engine, h, w, targets, **each, **options)[:2]

    def plain(h, w):
        return _plain(h, w, targets, **options)

    results = []
    for function, dtype in ((plain, torch.float64), (plain, kind), (ours, kind)):
        tensors = [x.to(dtype).detach().requires_grad_() for x in (hidden.to(kind), weight.to(kind))]
        total, losses = function(*tensors)
        results.append([x.detach().double() for x in (losses, *torch.autograd.grad(total, tensors))])
    exact, theirs, mine = results
    return [((c - a).norm(), (b - a).norm(), a.norm()) for a, b, c in zip(exact, theirs, mine, strict=True)]


def _assert_twice(errors, kind=torch.float32):
    for ours, theirs, size in errors:
        assert ours <= 2 * max(theirs, torch.finfo(kind).eps * size)


def _confident(sharpness):
    """Rows whose target's logit is ``sharpness``, the others' are about an eighth of it either way."""
    torch.manual_seed(0)
    weight, targets = F.normalize(torch.randn(200, 64)), torch.arange(16)
    return weight[targets] * sharpness, weight, targets


@pytest.mark.parametrize("engine", SLICED)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("sharpness", "loss"), [(12, 3e-3), (24, 4e-7), (30, 8e-9), (36, 2e-10)])
def test_confident_rows_are_as_exact(engine, sharpness, loss, smoothing):
    errors = _errors(engine, *_confident(sharpness), label_smoothing=smoothing)
    _assert_twice(errors)
    if not smoothing:
        assert loss / 5 < errors[0][2] / math.sqrt(16) < loss * 5
        if not engine.startswith("triton"):  # the target's exponential stays out of the others' sum
            assert all(ours <= 1e-5 * size for ours, _, size in errors)


@pytest.mark.parametrize("engine", SLICED)
@pytest.mark.parametrize(
    "kind", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.compiled)], ids=str
)  # the interpreter multiplies bfloat16 wrongly
def test_confident_rows_of_16_bits_are_as_exact(engine, kind):
    _assert_twice(_errors(engine, *_confident(12), kind), kind)


@pytest.mark.parametrize("engine", SLICED)
def test_many_small_probabilities_are_not_lost_beside_a_large_one(engine):
    """Those of a whole tile are less than float32 tells from nothing beside 1; together they are the loss."""
    torch.manual_seed(0)
    n, v = 2, 8000
    weight = torch.cat([torch.randn(v, 8) / 50, torch.zeros(v, n)], dim=1)
    targets = torch.tensor([0, 3000])
    weight[targets, 8 + torch.arange(n)] = 1.0
    hidden = torch.cat([torch.randn(n, 8), 20.5 * torch.eye(n)], dim=1)
    errors = _errors(engine, hidden, weight, targets)
    _assert_twice(errors)
    assert errors[0][0] <= 0.01 * errors[0][2]
    assert 1e-6 < errors[0][2] < 3e-5


@pytest.mark.parametrize("engine", SLICED)
@pytest.mark.parametrize("size", [0.05, 0.3, 1.0])
def test_a_cap_far_above_the_logits_costs_no_precision(engine, size):
    torch.manual_seed(1)
    hidden, weight, targets = torch.randn(16, 32), torch.randn(100, 32), torch.randint(0, 100, (16,))
    _assert_twice(_errors(engine, hidden * size, weight * size, targets, softcap=1000.0))


@pytest.mark.parametrize("engine", SLICED)
def test_probabilities_below_float16_s_normal_numbers_keep_their_gradient(engine):
    """As a flat softmax over 250112 classes has them; plain torch has a loss scale for it."""
    torch.manual_seed(0)
    weight, targets = torch.randn(101, 32).half() / 50, torch.arange(40)
    weight[targets, targets % 32] = 1.0
    hidden = (torch.randn(40, 32) / 4).half()
    hidden[torch.arange(40), targets % 32] = 13.5
    targets = targets % 32

    def grad(function, kind, scale):
        h, w = (x.to(kind).detach().requires_grad_() for x in (hidden, weight))
        (got,) = torch.autograd.grad(function(h, w) * scale, w)
        return got[40:].double() / scale  # of the classes that are no row's target

    exact = grad(lambda h, w: F.cross_entropy(h @ w.t(), targets), torch.float64, 1.0)
    plain = grad(lambda h, w: F.cross_entropy((h @ w.t()).float(), targets), torch.float16, 4096.0)
    ours = grad(lambda h, w: _loss(engine, h, w, targets).total, torch.float16, 4096.0)
    floor = torch.finfo(torch.float16).eps * exact.norm()
    assert (ours - exact).norm() <= 2 * torch.maximum((plain - exact).norm(), floor)


@pytest.mark.compiled
@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_the_judge_s_confident_rows_are_exact_beside_a_large_logit(smoothing):
    """Two logits that float64 holds exactly: the loss has a closed form."""
    gap, offset = 21.0, 4096.0
    hidden = torch.tensor([[1.0]], dtype=torch.float64)
    weight = torch.tensor([[offset + gap], [offset]], dtype=torch.float64)
    loss = _loss("reference", hidden, weight, torch.tensor([0]), label_smoothing=smoothing)
    exact = math.log1p(math.exp(-gap)) + smoothing * gap / 2
    assert loss.total.item() == pytest.approx(exact, rel=1e-6, abs=0)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("classes", [1, 5])
def test_a_z_loss_that_cancels_the_logsumexp_s_slope_leaves_a_finite_gradient(engine, smoothing, classes):
    hidden = torch.tensor([[-1.0 - math.log(classes)]]).repeat(3, 1).requires_grad_()
    weight = torch.ones(classes, 1, requires_grad=True)
    options = {"z_loss": 0.5, "label_smoothing": smoothing}  # 1 + 2 z_loss lse == 0 or nearly
    targets = torch.zeros(3, dtype=torch.int64)
    loss = _loss(engine, hidden, weight, targets, **options).total
    exact_inputs = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    exact = _loss("reference", *exact_inputs, targets, **options).total
    torch.testing.assert_close(loss, exact, check_dtype=False)
    ours = torch.autograd.grad(loss, (hidden, weight))
    for a, b in zip(ours, torch.autograd.grad(exact, exact_inputs), strict=True):
        torch.testing.assert_close(a, b, check_dtype=False, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_the_scale_is_the_products_and_the_cap_comes_last(engine, softcap):
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(19, 16), torch.randn(70, 16), 3.0 * torch.randn(70)
    targets = torch.randint(0, 70, (19,))
    options = {"logit_scale": 0.25, "softcap": softcap}
    results = []
    for kind, exact in ((torch.float64, True), (torch.float32, False)):
        tensors = [x.to(kind).detach().requires_grad_() for x in (hidden, weight, bias)]
        if exact:
            total, _ = _plain(*tensors[:2], targets, bias=tensors[2], **options)
        else:
            total = _loss(engine, *tensors[:2], targets, bias=tensors[2], **options).total
        results.append([total, *torch.autograd.grad(total, tensors)])
    for right, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, right, check_dtype=False, rtol=2e-5, atol=1e-6)


def _factors(engine, **options):
    torch.manual_seed(0)
    targets = torch.tensor([1, 2, -100, 4, 5])
    return _loss(
        engine, torch.randn(5, 8), torch.randn(11, 8), targets, segment_ids=torch.tensor([0, 1, 0, 1, 0]),
        n_segments=3, segment_weights=[1.0, 0.3, 2.0], **options,
    )  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES)
def test_a_factor_that_is_no_number_is_never_a_silent_zero(engine):
    fine = _factors(engine)
    assert fine.total.isfinite()
    assert fine.losses[2] == 0  # no row
    for bad in (math.nan, math.inf):
        weights = torch.ones(5)
        weights[1] = bad
        loss = _factors(engine, row_weights=weights)
        assert loss.total.isnan()
        assert loss.losses.isnan().tolist() == [False, True, False]
        assert torch.equal(loss.losses[::2], fine.losses[::2])
    weights = torch.ones(5)
    weights[2] = math.nan  # of a row that is left out
    assert torch.equal(_factors(engine, row_weights=weights).losses, fine.losses)
    for bad in (math.nan, -2.0, math.inf, -math.inf):
        loss = _factors(engine, denominators=torch.tensor([2.0, bad, 0.0]))
        assert loss.total.isnan()
        assert loss.losses.isnan().tolist() == [False, True, False]
        assert torch.equal(loss.losses[::2], fine.losses[::2])
    loss = _factors(engine, denominators=torch.tensor([2.0, 0.0, 5.0]))
    assert loss.losses[1:].tolist() == [0, 0]
    torch.testing.assert_close(loss.losses[0], fine.losses[0])
    loss = _factors(engine, row_weights=torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0]))
    assert loss.losses[1:].tolist() == [0, 0]


@pytest.mark.compiled
def test_denominators_of_another_length_are_refused_and_bad_ones_named():
    for shape in ((), (1,), (2,), (4,), (3, 1)):
        with pytest.raises(ValueError, match=r"denominators must have shape \(3,\)"):
            _factors("torch", denominators=torch.ones(shape))
    assert _factors("torch", denominators=torch.tensor([1.0, 2.0, 0.0]), debug=True).total.isfinite()
    for bad in (math.nan, -2.0, math.inf):
        with pytest.raises(ValueError, match=r"Segment 1 is bad: its denominator .*; 1 such segment"):
            _factors("torch", denominators=torch.tensor([1.0, bad, 0.0]), debug=True)
        weights = torch.ones(5)
        weights[3] = bad
        with pytest.raises(ValueError, match="Row 3 is bad: its row weight is negative or not finite"):
            _factors("torch", row_weights=weights, debug=True)


@pytest.mark.compiled
def test_a_class_that_a_narrow_type_confuses_with_the_ignored_one_counts():
    targets = torch.tensor([156, 2], dtype=torch.uint8)  # -100 in 8 bits
    assert _loss("torch", torch.randn(2, 4), torch.randn(200, 4), targets).counts.tolist() == [2]
    with pytest.raises(ValueError, match=r"targets must be integers, not torch\.bool"):
        _loss("torch", torch.randn(2, 4), torch.randn(200, 4), targets.bool())


@pytest.mark.compiled
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_no_row_is_asked_for_its_value_on_a_device(softcap):
    """Meta tensors have no values, so code that reads one fails where it would wait for a GPU."""
    n, d, v, k = 12, 8, 40, 2
    meta = {"device": "meta"}
    whole = {"dtype": torch.int64, **meta}
    plan = plan_rows(
        torch.empty(n, **whole), torch.empty(9, **whole), torch.empty(n, **whole), torch.empty(n, **meta),
        torch.empty(k, **meta), torch.empty(k, **meta), -100,
    )  # fmt: skip
    result = torch_engine.forward(
        Inputs(torch.empty(n, d, **meta), torch.empty(v, d, **meta), torch.empty(v, **meta)), plan,
        Options(0.1, 0.01, 0.5, softcap, 0.001), Need(True, True, True),
    )  # fmt: skip
    means, correct = segment_means(plan, result.losses, result.correct, k)
    assert means.shape == correct.shape == (k,)


@pytest.mark.interpreted
def test_a_bias_may_ban_a_whole_block_of_classes(monkeypatch):
    from sbs_edge.kernels import cublas_engine

    monkeypatch.setattr(cublas_engine, "BLOCK", 32)
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(7, 8), torch.randn(101, 8), 70 + torch.arange(7)
    bias = torch.where(torch.arange(101) < 65, -torch.inf, 0.0)
    results = []
    for engine in ("reference", "cublas"):
        tensors = [x.detach().requires_grad_() for x in (hidden, weight)]
        total = _loss(engine, *tensors, targets, bias=bias).total
        results.append([total, *torch.autograd.grad(total, tensors)])
    for right, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, right, rtol=2e-5, atol=1e-6)


@pytest.mark.interpreted
def test_a_gain_leaves_room_for_the_largest_product():
    from sbs_edge.kernels.cublas_engine import _bounded_gain

    for size, gain in ((1.0, 256.0), (64.0, 128.0), (-1000.0, 16.0), (20000.0, 1.0)):
        large = torch.tensor([[0.0, size]])
        for rows, weight in ((large.half(), torch.ones(3, 2)), (torch.ones(1, 2).half(), large)):
            assert _bounded_gain(rows, weight).tolist() == [gain]
