"""The sliced torch engine against plain torch in float64, with plain torch in float32 as the yardstick."""

import pytest
import torch
import torch.nn.functional as F

from sbs_edge.kernels.cross_entropy import fused_linear_cross_entropy

pytestmark = pytest.mark.compiled

LAMBDAS = (1.0, 0.3)


def _plain(hidden, weight, targets, segments, scale):
    """The objective spelled out with full logits, by torch's own cross-entropy."""
    logits = hidden @ weight.t() * scale
    each = F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
    total = hidden.sum() * 0
    for k, factor in enumerate(LAMBDAS):
        mine = (segments == k) & (targets != -100)
        if mine.any():
            total = total + factor * each[mine].sum() / mine.sum()
    return total


def _run(function, hidden, weight, dtype):
    h, w = (x.to(dtype).detach().requires_grad_() for x in (hidden, weight))
    total = function(h, w)
    (total * 3.0).backward()  # a non-unit upstream gradient
    return [total.detach().double(), h.grad.double(), w.grad.double()]


# 1 row; odd everything; ByT5's vocabulary with several slices; mT5's ids beyond 16 bits.
@pytest.mark.parametrize(("n", "d", "v"), [(1, 8, 5), (37, 19, 101), (300, 64, 384), (5, 8, 250112)], ids=str)
def test_error_is_at_most_twice_that_of_plain_torch(n, d, v):
    torch.manual_seed(0)
    hidden, weight = torch.randn(n, d), torch.randn(v, d)
    targets = torch.randint(0, v, (n,))
    targets[1::3] = -100
    segments = torch.arange(n) % 2
    scale = d**-0.5

    def ours(h, w):
        return fused_linear_cross_entropy(
            h, w, targets, segment_ids=segments, n_segments=2, segment_weights=LAMBDAS,
            logit_scale=scale, engine="torch", workspace_mb=2 * v * 4 / 2**20 + 0.05,
        ).total  # fmt: skip

    def plain(h, w):
        return _plain(h, w, targets, segments, scale)

    truth = _run(plain, hidden, weight, torch.float64)
    for exact, mine, yardstick in zip(
        truth,
        _run(ours, hidden, weight, torch.float32),
        _run(plain, hidden, weight, torch.float32),
        strict=True,
    ):
        floor = torch.finfo(torch.float32).eps * exact.norm()  # the yardstick may be exact by luck
        assert (mine - exact).norm() <= 2 * torch.maximum((yardstick - exact).norm(), floor)


@pytest.mark.parametrize("n", [0, 4])
def test_without_a_valid_row_everything_is_zero(n):
    hidden, weight = torch.randn(n, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    result = fused_linear_cross_entropy(hidden, weight, torch.full((n,), -100), n_segments=2, engine="torch")
    result.total.backward()
    assert result.total.item() == 0
    assert result.losses.tolist() == [0, 0]
    assert result.counts.tolist() == [0, 0]
    assert not hidden.grad.any()
    assert not weight.grad.any()


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 3.0}], ids=str)
def test_gradcheck(options):
    torch.manual_seed(1)
    inputs = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in [(6, 4), (9, 4), (9,)]]
    targets = torch.tensor([0, 3, -100, 8, 2, 2])

    def total(h, w, b):
        return fused_linear_cross_entropy(h, w, targets, bias=b, engine="torch", **options).total

    assert torch.autograd.gradcheck(total, inputs)
