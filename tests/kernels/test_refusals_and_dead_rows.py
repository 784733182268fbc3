"""Derivatives that do not exist are refused, rows without weight leave nothing, and long sums stay exact.

The engines for GPUs run in Triton's interpreter, in a process of their own, by the same tests.
"""

import contextlib
import itertools
import os

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from sbs_edge.kernels import chunks, products, tile_table
from sbs_edge.kernels.cross_entropy import fused_linear_cross_entropy
from sbs_edge.kernels.plan import plan_rows, segment_means

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ENGINES = ["cublas", "triton-vocab_chunks", "triton-row_chunks"] if INTERPRETED else ["torch"]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(chunks, "ROW_STEP", 16)


def _loss(engine, *args, **options):
    name, _, kind = engine.partition("-")
    with chunks.use(kind) if kind else contextlib.nullcontext():
        return fused_linear_cross_entropy(*args, engine=name, **options)


def _case(n=9, d=16, v=40, grad=True):
    torch.manual_seed(0)
    hidden, weight = torch.randn(n, d), torch.randn(v, d)
    return hidden.requires_grad_(grad), weight.requires_grad_(grad), torch.randint(0, v, (n,))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_gradient_of_the_gradient_raises_and_the_first_stays_right(engine):
    hidden, weight, targets = _case()
    plain = torch.autograd.grad(_loss(engine, hidden, weight, targets).total, (hidden, weight))
    scale = torch.tensor(3.0, requires_grad=True)
    for factor in (torch.tensor(1.0), scale):
        loss = _loss(engine, hidden, weight, targets).total * factor
        found = torch.autograd.grad(loss, (hidden, weight), create_graph=True)
        for a, b in zip(found, plain, strict=True):
            torch.testing.assert_close(a.detach(), b * factor.detach(), rtol=1e-5, atol=1e-6)
        penalty = loss + sum((g**2).sum() for g in found)
        with pytest.raises(NotImplementedError, match="first derivatives only"):
            penalty.backward(retain_graph=True)
        for wanted in (hidden, weight):
            with pytest.raises(NotImplementedError, match="first derivatives only"):
                torch.autograd.grad(found[0].sum(), wanted, allow_unused=True, retain_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        torch.autograd.functional.hessian(lambda h: _loss(engine, h, weight, targets).total, hidden)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.func's own use of torch.jit
@pytest.mark.parametrize("engine", ENGINES)
def test_forward_mode_and_function_transforms_raise(engine):
    hidden, weight, targets = _case(grad=False)
    ones = torch.ones_like(hidden)

    def loss(h):
        return _loss(engine, h, weight, targets).total

    calls = [
        lambda: torch.func.jvp(loss, (hidden,), (ones,)), lambda: torch.func.grad(loss)(hidden),
        lambda: torch.func.vmap(loss)(hidden.unsqueeze(0)), lambda: torch.func.hessian(loss)(hidden),
        lambda: torch.func.jacrev(loss)(hidden), lambda: torch.func.jacfwd(loss)(hidden),
        lambda: torch.func.vjp(loss, hidden), lambda: torch.func.linearize(loss, hidden),
        lambda: torch.func.grad(lambda w: _loss(engine, hidden, w, targets).total)(weight),
        lambda: torch.func.grad(lambda b: _loss(engine, hidden, weight, targets, bias=b).total)(torch.zeros(40)),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(
            NotImplementedError, match=r"first derivatives in reverse mode only.*engine='reference'"
        ):
            call()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(hidden, ones)
        with pytest.raises(NotImplementedError, match="first derivatives in reverse mode only"):
            loss(dual)
        assert loss(hidden).isfinite()  # without a tangent there is nothing to lose
    assert loss(hidden).isfinite()


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_reference_has_the_derivatives_that_it_is_named_for():
    hidden, weight, targets = _case(grad=False)

    def total(h, plain):
        loss = F.cross_entropy(h @ weight.t(), targets)
        return loss if plain else _loss("reference", h, weight, targets).total

    ones, results = torch.ones_like(hidden), []
    for plain in (True, False):
        with forward_ad.dual_level():
            out = total(forward_ad.make_dual(hidden, ones), plain)
            tangent = forward_ad.unpack_dual(out).tangent
        h = hidden.clone().requires_grad_()
        (g,) = torch.autograd.grad(total(h, plain), h, create_graph=True)
        (second,) = torch.autograd.grad((g**2).sum(), h)
        results.append((tangent, second))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


HOW, NAN, INF = ("row weight", "segment weight", "denominator"), float("nan"), float("inf")
DEAD = list(itertools.product(HOW, (NAN, INF, 1e38), (torch.float32, torch.float16)))
if INTERPRETED:  # seconds each
    DEAD = [
        *((how, NAN, torch.float32) for how in HOW), (HOW[0], NAN, torch.float16), (HOW[0], INF, torch.float32),
        (HOW[0], 1e38, torch.float32),
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter's maximum over NaN
@pytest.mark.parametrize("engine", [*ENGINES, *([] if INTERPRETED else ["reference"])])
@pytest.mark.parametrize(("how", "bad", "kind"), DEAD, ids=str)
def test_a_row_without_weight_leaves_nothing_whatever_its_state(engine, how, bad, kind):
    hidden, weight, targets = _case(12, grad=False)
    dead = torch.tensor([1, 4, 5])
    ids = torch.zeros(12, dtype=torch.int64).index_fill(0, dead, 1)
    options = {"segment_ids": ids, "n_segments": 2, "label_smoothing": 0.1, "z_loss": 0.01}
    if how == "row weight":
        options["row_weights"] = torch.ones(12).index_fill(0, dead, 0.0)
    elif how == "segment weight":
        options["segment_weights"] = (1.0, 0.0)
    else:
        options["denominators"] = torch.tensor([9.0, 0.0])
    bias = torch.randn(40)

    def run(engine, states, kind, targets=targets, **options):
        tensors = [x.to(kind).requires_grad_() for x in (states, weight, bias)]
        loss = _loss(engine, *tensors[:2], targets, bias=tensors[2], **options)
        return loss, [
            loss.total.detach(),
            *(g.double() for g in torch.autograd.grad(loss.total * 2.0, tensors)),
        ]

    spoiled = hidden.clone()
    spoiled[dead] = bad
    left_out = targets.index_fill(0, dead, -100)
    _, right = run("reference", hidden.to(kind).double(), torch.float64, left_out, **options)
    loss, found = run(engine, spoiled, kind, **options)
    assert loss.counts.tolist() == [9, 3]
    assert loss.losses[0].isfinite()
    tolerance = 2e-5 if kind == torch.float32 else 5e-3
    for ours, exact in zip(found, right, strict=True):
        torch.testing.assert_close(ours, exact, check_dtype=False, rtol=tolerance, atol=tolerance / 5)
    assert not found[1][dead].any()
    # Their hits are those of their states, and a weight of one brings the NaN back.
    assert _loss(engine, hidden, weight, (hidden @ weight.t()).argmax(1), **options).correct.tolist() == [
        9,
        3,
    ]
    if bad != 1e38:
        assert not _loss(engine, spoiled.to(kind), weight.to(kind), targets).total.isfinite()


@pytest.mark.parametrize("engine", ENGINES)
def test_logits_whose_square_is_infinite_have_a_loss(engine):
    hidden, weight, targets = _case()
    hidden = (hidden.detach() * 1e20).requires_grad_()
    loss = _loss(engine, hidden, weight, targets)
    plain = F.cross_entropy(hidden @ weight.t(), targets)
    torch.testing.assert_close(loss.total, plain)
    assert loss.total > 1e19
    for a, b in zip(
        torch.autograd.grad(loss.total, (hidden, weight)),
        torch.autograd.grad(plain, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("z_loss", [0.0, 1.0])
def test_the_bias_gradient_of_many_rows_is_within_twice_plain_torch_s_error(engine, z_loss):
    n, d, v = (600, 8, 24) if INTERPRETED else (65536, 8, 64)
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(n, d) / d**0.5, torch.randn(v, d), torch.randn(v) * 0.02
    targets = torch.randint(0, v, (n,))

    def gradient(kind, ours):
        h, w, b = (x.to(kind).requires_grad_(x is bias) for x in (hidden, weight, bias))
        if ours:
            # Larger tiles than the interpreter's own: it takes its time for each.
            with tile_table.use(tile_table.Tile(256, 32, 16, 4, 1)):
                total = _loss(engine, h, w, targets, bias=b, z_loss=z_loss, workspace_mb=0.5).total
        else:
            logits = F.linear(h, w, b)
            total = F.cross_entropy(logits, targets) + z_loss * (torch.logsumexp(logits, 1) ** 2).mean()
        return torch.autograd.grad(total, b)[0].double()

    exact = gradient(torch.float64, False)
    plain, mine = ((gradient(torch.float32, ours) - exact).norm() for ours in (False, True))
    assert mine <= 2 * max(plain, torch.finfo(torch.float32).eps / 4 * exact.norm())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("known", [True, False])
def test_rows_are_looked_for_and_planned_once_a_step(engine, known):
    hidden, weight, targets = _case()
    targets[::3] = -100
    given = {"valid_indices": (targets != -100).nonzero().squeeze(1)} if known else {}
    total = _loss(engine, hidden, weight, targets, **given).total
    with torch.profiler.profile() as record:
        _loss(engine, hidden, weight, targets, **given)
    assert sum(e.count for e in record.key_averages() if e.key == "aten::nonzero") == (0 if known else 1)
    with torch.profiler.profile() as record:
        total.backward()
    names = {e.key for e in record.key_averages()}
    assert not names & {"aten::nonzero", "aten::ne"}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("fast", [False, True])
def test_products_are_made_in_float32_whatever_torch_s_switch(engine, fast, monkeypatch):
    hidden, weight, targets = _case()
    seen = []
    inner = products.full_precision

    @contextlib.contextmanager
    def watched():
        with inner():
            seen.append((
                torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision,
                torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
            ))  # fmt: skip
            yield

    from sbs_edge.kernels import op

    monkeypatch.setattr(op, "full_precision", watched)
    before = torch.get_float32_matmul_precision()
    if fast:
        torch.set_float32_matmul_precision("medium")
    try:
        switches = (torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision)
        _loss(engine, hidden, weight, targets).total.backward()
        after = (torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision)
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen
    assert all(cuda in ("ieee", "none") and cpu in ("ieee", "none") and not low for cuda, cpu, low in seen)
    assert after == switches
    assert (switches == ("tf32", "bf16")) == fast


@pytest.mark.parametrize("engine", ENGINES)
def test_what_a_hook_on_saved_tensors_holds_is_left_alone(engine):
    hidden, weight, targets = _case()
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return len(kept) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda position: kept[position]):
        total = _loss(engine, hidden, weight, targets).total
    before = [x.clone() for x in kept]
    grads = torch.autograd.grad(3 * total, (hidden, weight))
    assert kept
    assert all(torch.equal(a, b) for a, b in zip(kept, before, strict=True))
    for a, b in zip(
        grads,
        torch.autograd.grad(_loss(engine, hidden, weight, targets).total * 3, (hidden, weight)),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("engine", ENGINES)
def test_hits_need_not_be_counted(engine):
    hidden, weight, targets = _case()
    counted = _loss(engine, hidden, weight, targets)
    spared = _loss(engine, hidden, weight, targets, count_correct=False)
    assert spared.correct.tolist() == [-1]
    assert spared.accuracy.isnan().all()
    torch.testing.assert_close(spared.total, counted.total, rtol=1e-6, atol=0)
    assert torch.equal(spared.counts, counted.counts)


@pytest.mark.interpreted
@pytest.mark.parametrize("engine", ENGINES)
def test_the_interpreter_refuses_bfloat16(engine):
    hidden, weight, targets = _case(grad=False)
    with pytest.raises(RuntimeError, match="interpreter multiplies bfloat16 wrongly"):
        _loss(engine, hidden.bfloat16(), weight.bfloat16(), targets)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RuntimeError, match="bfloat16"):
        _loss(engine, hidden, weight, targets)
    # A weight or bias of another type is cast, and right.
    mixed = _loss(
        engine, hidden.half(), weight.bfloat16(), targets, bias=torch.zeros(40, dtype=torch.bfloat16)
    )
    exact = F.cross_entropy(hidden.half().double() @ weight.bfloat16().double().t(), targets)
    torch.testing.assert_close(mixed.total, exact, check_dtype=False, rtol=2e-3, atol=0)


@pytest.mark.interpreted
@pytest.mark.parametrize("group", [1, 2, 5, 1 << 20])
@pytest.mark.parametrize("kind", chunks.CHUNKS)
def test_groups_of_row_blocks_change_no_bit(kind, group):
    hidden, weight, targets = _case(75, 16, 200)
    results = []
    for size in (1 << 20, group):
        with tile_table.tuned(row_blocks_a_group=size):
            loss = _loss(f"triton-{kind}", hidden, weight, targets)
            results.append((loss.total, loss.correct, *torch.autograd.grad(loss.total, (hidden, weight))))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.compiled
def test_meta_tensors_have_shapes_and_gradients():
    meta = {"device": "meta"}
    for kind in (torch.float32, torch.bfloat16):
        tensors = [
            torch.empty(s, dtype=kind, requires_grad=True, **meta) for s in ((23, 16), (57, 16), (57,))
        ]
        loss = fused_linear_cross_entropy(
            *tensors[:2],
            torch.empty(23, dtype=torch.int64, **meta),
            bias=tensors[2],
            n_segments=3,
            debug=True,
        )
        assert loss.total.shape == ()
        assert loss.losses.shape == loss.counts.shape == loss.accuracy.shape == (3,)
        assert loss.total.dtype == torch.float32
        for tensor, gradient in zip(tensors, torch.autograd.grad(loss.total, tensors), strict=True):
            assert (gradient.shape, gradient.dtype, gradient.device) == (
                tensor.shape,
                tensor.dtype,
                tensor.device,
            )


@pytest.mark.compiled
@pytest.mark.parametrize("n_segments", [1, 8, 9, 300])
def test_segments_are_summed_without_a_buffer_of_segments_times_rows(n_segments):
    n = 3000
    torch.manual_seed(0)
    targets, segments = torch.randint(0, 5, (n,)), torch.randint(0, n_segments, (n,))
    targets[::4] = -100
    weights, lambdas = torch.rand(n), torch.rand(n_segments)
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for made in out if isinstance(out, (tuple, list)) else (out,):
                largest = max(largest, made.numel() if isinstance(made, torch.Tensor) else 0)
            return out

    with Sizes():
        plan = plan_rows(targets, None, segments, weights, lambdas, None, -100)
        losses, hits = torch.rand(len(plan.indices)), torch.rand(len(plan.indices)) < 0.5
        means, correct = segment_means(plan, losses, hits, n_segments)
    assert largest <= 8 * n
    kept = targets != -100
    for k in range(n_segments):
        mine = segments[kept] == k
        r = weights[kept][mine].double()
        mean = (r * losses[mine]).sum() / r.sum() if mine.any() else torch.tensor(0.0)
        torch.testing.assert_close(means[k], mean, check_dtype=False, rtol=1e-5, atol=1e-7)
        assert plan.counts[k] == mine.sum()
        assert correct[k] == hits[mine].sum()
