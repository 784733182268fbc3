"""The operator where training uses it: autocast, loss scales, compile, checkpointing, frozen and tied weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from sbs_edge.kernels.cross_entropy import fused_linear_cross_entropy

pytestmark = pytest.mark.compiled


def _inputs(n: int = 23, d: int = 16, v: int = 57, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(seed)
    hidden = torch.randn(n, d, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(v, d, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(0, v, (n,))
    targets[::4] = -100
    segments = torch.randint(0, 2, (n,))
    return hidden, weight, targets, segments


def _grads(total: torch.Tensor, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(total, tensors))


def _error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm().clamp(min=1e-30))


@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, 1.0), (torch.float16, 65536.0)])
def test_low_precision_inputs_under_any_loss_scale_are_at_least_as_exact_as_plain_torch(
    dtype: torch.dtype, scale: float
) -> None:
    hidden, weight, targets, segments = _inputs(dtype=dtype)
    got = fused_linear_cross_entropy(hidden, weight, targets, segment_ids=segments, n_segments=2)
    ours = _grads(got.total * scale, hidden, weight)
    wide_h, wide_w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    exact = fused_linear_cross_entropy(
        wide_h, wide_w, targets, segment_ids=segments, n_segments=2, engine="reference"
    )
    exact_grads = _grads(exact.total, wide_h, wide_w)
    plain = torch.zeros((), dtype=torch.float32)
    for k in range(2):
        rows = (targets != -100) & (segments == k)
        plain = plain + torch.nn.functional.cross_entropy((hidden[rows] @ weight.t()).float(), targets[rows])
    plain_grads = _grads(plain * scale, hidden, weight)
    for our, their, right in zip(ours, plain_grads, exact_grads, strict=True):
        assert _error(our / scale, right) <= 2 * _error(their / scale, right) + torch.finfo(dtype).eps
    assert _error(got.total.detach(), exact.total.detach()) <= 1e-3


def test_autocast_changes_the_inputs_not_the_engine() -> None:
    hidden, weight, targets, _ = _inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = fused_linear_cross_entropy(hidden, weight, targets)
        ours = _grads(cast.total, hidden, weight)
    plain = fused_linear_cross_entropy(hidden.detach().bfloat16().float(), weight, targets)
    assert cast.total == plain.total
    assert ours[0].dtype == torch.float32
    assert _error(ours[1], _grads(plain.total, weight)[0].double()) < 1e-6


def test_compile_sees_one_graph_and_gives_the_same_bits() -> None:
    hidden, weight, targets, segments = _inputs()

    def loss(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return fused_linear_cross_entropy(h, w, targets, segment_ids=segments, n_segments=2).total

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(hidden, weight), loss(hidden, weight))
    for a, b in zip(
        _grads(compiled(hidden, weight), hidden, weight),
        _grads(loss(hidden, weight), hidden, weight),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_checkpointing_frozen_and_tied_weights() -> None:
    hidden, weight, targets, _ = _inputs()
    plain = _grads(fused_linear_cross_entropy(hidden, weight, targets).total, hidden, weight)
    again = checkpoint(
        lambda h, w: fused_linear_cross_entropy(h, w, targets).total, hidden, weight, use_reentrant=False
    )
    for a, b in zip(_grads(again, hidden, weight), plain, strict=True):
        assert torch.equal(a, b)
    frozen = fused_linear_cross_entropy(hidden, weight.detach(), targets)
    assert torch.equal(_grads(frozen.total, hidden)[0], plain[0])
    fixed = fused_linear_cross_entropy(hidden.detach(), weight, targets)
    assert torch.equal(_grads(fixed.total, weight)[0], plain[1])
    # Tied: the embedding's own gradient and the head's add up.
    ids = torch.randint(0, weight.shape[0], (hidden.shape[0],))
    tied = fused_linear_cross_entropy(torch.nn.functional.embedding(ids, weight), weight, targets)
    (both,) = _grads(tied.total, weight)
    rows = torch.nn.functional.embedding(ids, weight).detach().requires_grad_()
    apart = fused_linear_cross_entropy(rows, weight, targets)
    through_rows, through_head = _grads(apart.total, rows, weight)
    expected = through_head.clone().index_add_(0, ids, through_rows)
    torch.testing.assert_close(both, expected)


def test_strides_valid_indices_and_repetition_change_no_bit() -> None:
    hidden, weight, targets, segments = _inputs()
    first = fused_linear_cross_entropy(hidden, weight, targets, segment_ids=segments, n_segments=2)
    again = fused_linear_cross_entropy(hidden, weight, targets, segment_ids=segments, n_segments=2)
    assert torch.equal(first.total, again.total)
    strided = hidden.detach().t().contiguous().t()
    assert not strided.is_contiguous()
    known = (targets != -100).nonzero().squeeze(1)
    other = fused_linear_cross_entropy(
        strided, weight, targets, segment_ids=segments, n_segments=2, valid_indices=known
    )
    assert torch.equal(first.losses, other.losses)


def test_bad_rows_are_named_in_debug_mode_and_never_a_silent_number_without() -> None:
    hidden, weight, targets, segments = _inputs()
    targets[5] = weight.shape[0]
    with pytest.raises(ValueError, match=r"Row 5 is bad: its target is outside \[0, V\)"):
        fused_linear_cross_entropy(hidden, weight, targets, debug=True)
    assert fused_linear_cross_entropy(hidden, weight, targets).total.isnan()
    targets[5] = 0
    segments[6] = 7
    with pytest.raises(ValueError, match="Row 6 is bad: its segment"):
        fused_linear_cross_entropy(hidden, weight, targets, segment_ids=segments, n_segments=2, debug=True)
    with pytest.raises(ValueError, match=r"targets must have shape \(23,\)"):
        fused_linear_cross_entropy(hidden, weight, targets[:3])


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 40), d=st.integers(1, 9), v=st.integers(2, 70), k=st.integers(1, 4), seed=st.integers(0, 99),
    ignored=st.floats(0, 1), scale=st.sampled_from((1.0, 0.125)), smoothing=st.sampled_from((0.0, 0.2)),
    z_loss=st.sampled_from((0.0, 0.01)), softcap=st.sampled_from((0.0, 3.0)),
    workspace=st.sampled_from((None, 0.001)), weighted=st.booleans(), counted=st.booleans(),
)  # fmt: skip
def test_any_shape_segments_weights_and_options_match_float64(
    n: int, d: int, v: int, k: int, seed: int, ignored: float, scale: float, smoothing: float, z_loss: float,
    softcap: float, workspace: float | None, weighted: bool, counted: bool,
) -> None:  # fmt: skip
    hidden, weight, targets, _ = _inputs(n, d, v, seed, torch.float64)
    targets[torch.rand(n) < ignored] = -100
    options: dict[str, Any] = {
        "segment_ids": torch.randint(0, k, (n,)), "n_segments": k, "segment_weights": torch.rand(k).tolist(),
        "row_weights": torch.rand(n, dtype=torch.float64) if weighted else None,
        "denominators": torch.rand(k, dtype=torch.float64) + 0.5 if counted else None,
        "logit_scale": scale, "label_smoothing": smoothing, "z_loss": z_loss, "softcap": softcap,
        "bias": torch.randn(v, dtype=torch.float64, requires_grad=True),
    }  # fmt: skip
    got = fused_linear_cross_entropy(
        hidden, weight, targets, workspace_mb=workspace, engine="torch", **options
    )
    want = fused_linear_cross_entropy(hidden, weight, targets, engine="reference", **options)
    for name in ("total", "losses", "counts", "correct"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), check_dtype=False)
    tensors = (hidden, weight, options["bias"])
    if want.total.requires_grad:
        for a, b in zip(_grads(got.total, *tensors), _grads(want.total, *tensors), strict=True):
            torch.testing.assert_close(a, b)
