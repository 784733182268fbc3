"""Gradients made in the forward pass are scaled where they lie, unless somebody may ask for them again."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from sbs_edge.kernels.cross_entropy import fused_linear_cross_entropy

pytestmark = pytest.mark.compiled

N, D, V = 64, 32, 20000


def _inputs():
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    return hidden, weight, torch.randint(0, V, (N,))


def _peak_bytes(call):
    """The most that torch's allocator had handed out at once beyond what it had at the start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("keep", [False, True])
def test_the_backward_pass_takes_no_second_gradient_of_the_weight(scale, keep):
    hidden, weight, targets = _inputs()
    total = fused_linear_cross_entropy(hidden, weight, targets, engine="torch").total * scale
    whole = V * D * 4
    peak = _peak_bytes(lambda: total.backward(retain_graph=keep))
    assert (peak >= whole) if keep else (peak < whole / 10)
    assert weight.grad.shape == (V, D)


def test_the_whole_step_takes_one_gradient_and_one_slice():
    hidden, weight, targets = _inputs()
    slice_bytes = 16 * V * 4

    def step():
        total = fused_linear_cross_entropy(
            hidden, weight, targets, engine="torch", workspace_mb=slice_bytes / 2**20
        ).total
        (total * 0.5).backward()

    step()  # what is loaded once is loaded
    hidden.grad = weight.grad = None
    assert _peak_bytes(step) < 1.15 * (V * D * 4 + slice_bytes)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_second_walk_over_a_kept_graph_finds_the_same(scale):
    hidden, weight, targets = _inputs()
    total = fused_linear_cross_entropy(hidden, weight, targets, engine="torch").total
    up = torch.tensor(scale)
    first = [g.clone() for g in torch.autograd.grad(total, (hidden, weight), up, retain_graph=True)]
    second = torch.autograd.grad(total, (hidden, weight), up, retain_graph=True)
    for gradient in second:
        gradient.zero_()  # a caller may do with it what it likes
    third = torch.autograd.grad(total, (hidden, weight), up)
    for a, b in zip(first, third, strict=True):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(total, (hidden, weight), up)


def test_accumulation_shared_weights_scalers_and_checkpoints_add_up():
    hidden, weight, targets = _inputs()

    def loss(h, w):
        return fused_linear_cross_entropy(h, w, targets, engine="torch").total

    plain = torch.autograd.grad(loss(hidden, weight), (hidden, weight), retain_graph=True)
    for call in (
        lambda: (loss(hidden, weight) * 0.25).backward(),
        lambda: (checkpoint(loss, hidden, weight, use_reentrant=False) * 0.25).backward(),
        lambda: (torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden, weight) * 0.25).backward(),
        lambda: (loss(hidden, weight) * 0.125 + loss(hidden, weight) * 0.125).backward(),
    ):
        call()
    for tensor, gradient in zip((hidden, weight), plain, strict=True):
        torch.testing.assert_close(tensor.grad, gradient, rtol=1e-6, atol=0)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    optimizer = torch.optim.SGD([hidden, weight], lr=0.0)
    optimizer.zero_grad()
    scaler.scale(loss(hidden, weight)).backward()
    scaler.unscale_(optimizer)
    for tensor, gradient in zip((hidden, weight), plain, strict=True):
        assert torch.equal(tensor.grad, gradient)


def test_several_upstream_gradients_at_once_are_copied():
    hidden, weight, targets = _inputs()
    total = fused_linear_cross_entropy(hidden, weight, targets, engine="torch").total
    (plain,) = torch.autograd.grad(total, hidden, retain_graph=True)
    (many,) = torch.autograd.grad(total, hidden, torch.tensor([1.0, -2.0]), is_grads_batched=True)
    assert torch.equal(many, torch.stack([plain, -2.0 * plain]))
