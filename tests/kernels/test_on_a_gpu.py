"""Every engine that works on this machine's GPU, bfloat16 included; skipped where there is none."""

import pytest
import torch

from sbs_edge.kernels import chunks
from sbs_edge.kernels.cross_entropy import available_engines, fused_linear_cross_entropy

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)
pytestmark = pytest.mark.compiled
ENGINES = [s.name for s in available_engines() if s.available and s.name != "reference"]
SHAPES = [
    (1, 64, 384),  # one row, ByT5
    (37, 72, 1001),  # nothing divides a block, unaligned rows of the weight's slices
    (515, 512, 32128),  # T5
    (300, 768, 32100),  # the vocabulary ends inside a block
    (129, 512, 250112),  # mT5
    (5000, 768, 32128),  # many row blocks, several slices
]


def _case(n, d, v, kind):
    torch.manual_seed(0)
    hidden = torch.randn(n, d, device="cuda").to(kind)
    weight = (torch.randn(v, d, device="cuda") * d**-0.5).to(kind)
    targets = torch.randint(0, v, (n,), device="cuda")
    targets[::2] = torch.arange(n, device="cuda")[::2] % v
    targets[1::3] = -100
    return hidden, weight, targets


def _values(engine, case, kind, weight_kind=None, scale=1.0, **options):
    hidden, weight, targets = case
    tensors = (hidden.to(kind).requires_grad_(), weight.to(weight_kind or kind).requires_grad_())
    loss = fused_linear_cross_entropy(
        *tensors, targets, engine=engine, segment_ids=torch.arange(len(targets), device="cuda") % 2,
        n_segments=2, segment_weights=(1.0, 0.3), **options,
    )  # fmt: skip
    grads = torch.autograd.grad(loss.total * scale, tensors)
    return [loss.total.detach().double(), *(g.double() / scale for g in grads)]


ORDERS = [
    (name, order) for name in ENGINES for order in ("vocab_chunks", "row_chunks")[: 1 + (name == "triton")]
]


@pytest.mark.parametrize(("engine", "order"), ORDERS)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("mixed", [False, True], ids=["whole", "master-weight"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_twice_that_of_plain_torch(shape, mixed, kind, engine, order):
    case = _case(*shape, kind)
    weight_kind = torch.float32 if mixed else None
    scale = 65536.0 if kind == torch.float16 and mixed else 1.0
    exact = _values("reference", case, torch.float64)
    plain = _values("reference", case, kind, weight_kind)
    with chunks.use(order):
        mine = _values(engine, case, kind, weight_kind, scale)
        again = _values(engine, case, kind, weight_kind, scale)
    for right, theirs, ours, repeated in zip(exact, plain, mine, again, strict=True):
        floor = torch.finfo(kind).eps * right.norm()
        assert (ours - right).norm() <= 2 * torch.maximum((theirs - right).norm(), floor)
        assert torch.equal(ours, repeated)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_option_at_once(engine):
    case = _case(700, 256, 5003, torch.bfloat16)
    options = {
        "label_smoothing": 0.1,
        "z_loss": 1e-3,
        "softcap": 20.0,
        "logit_scale": 0.5,
        "workspace_mb": 4.0,
    }
    exact = _values("reference", case, torch.float64, **options)
    plain = _values("reference", case, torch.bfloat16, **options)
    for right, theirs, ours in zip(
        exact, plain, _values(engine, case, torch.bfloat16, **options), strict=True
    ):
        floor = torch.finfo(torch.bfloat16).eps * right.norm()
        assert (ours - right).norm() <= 2 * torch.maximum((theirs - right).norm(), floor)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_waits_for_nothing_when_the_rows_are_known(engine):
    hidden, weight, targets = _case(64, 64, 512, torch.bfloat16)
    known = (targets != -100).nonzero().squeeze(1)
    tensors = (hidden.requires_grad_(), weight.requires_grad_())

    def step():
        loss = fused_linear_cross_entropy(
            *tensors, targets, valid_indices=known, segment_weights=(1.0,), engine=engine
        )
        return torch.autograd.grad(loss.total, tensors)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("engine", ENGINES)
def test_compiled_whole(engine):
    hidden, weight, targets = _case(64, 64, 512, torch.bfloat16)
    tensors = (hidden.requires_grad_(), weight.requires_grad_())

    def loss(h, w):
        return fused_linear_cross_entropy(h * 1, w, targets, engine=engine).total

    compiled = torch.compile(loss, fullgraph=True)
    assert torch.equal(compiled(*tensors), loss(*tensors))
    for a, b in zip(
        torch.autograd.grad(compiled(*tensors), tensors),
        torch.autograd.grad(loss(*tensors), tensors),
        strict=True,
    ):
        assert torch.equal(a, b)
