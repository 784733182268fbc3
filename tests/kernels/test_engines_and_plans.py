"""Which engine is chosen, how much memory it plans for and takes, and what happens to sharded weights."""

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from sbs_edge.kernels import engines, torch_engine
from sbs_edge.kernels.cross_entropy import available_engines, fused_linear_cross_entropy, select_engine
from sbs_edge.kernels.plan import Inputs, Need, Options, plan_rows

pytestmark = pytest.mark.compiled


@pytest.mark.parametrize(
    ("capability", "dtype", "chosen"),
    [
        ((12, 0), torch.bfloat16, "triton"), ((10, 3), torch.bfloat16, "triton"),
        ((9, 0), torch.float32, "cublas"), ((8, 0), torch.float16, "triton"),
        ((7, 5), torch.float16, "cublas"), ((7, 5), torch.float32, "cublas"), ((6, 1), torch.float16, "torch"),
        ((9, 0), torch.float64, "torch"), (None, torch.float32, "torch"),
    ],
)  # fmt: skip
def test_auto_takes_tiles_then_library_products_then_slices(monkeypatch, capability, dtype, chosen):
    pytest.importorskip("triton")
    monkeypatch.setattr(engines, "_capability", lambda index=None: capability)
    assert select_engine(torch.device("cuda", 0), dtype) == chosen
    assert select_engine(torch.device("cpu"), dtype) == "torch"
    said = {status.name: status for status in available_engines()}
    assert said["torch"].available
    assert said["triton"].available == (capability is not None and capability >= (8, 0))
    if chosen in ("triton", "cublas"):
        assert "chosen by auto" in said[chosen].reason
        with pytest.raises(RuntimeError, match="the tensors are on cpu"):
            engines.resolve(chosen, torch.device("cpu"), dtype)


def test_an_engine_asked_for_by_name_says_why_it_cannot_run():
    hidden, weight, targets = torch.randn(2, 4), torch.randn(3, 4), torch.tensor([0, 1])
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="engine 'triton' cannot run here"):
            fused_linear_cross_entropy(hidden, weight, targets, engine="triton")
    with pytest.raises(ValueError, match="engine must be"):
        fused_linear_cross_entropy(hidden, weight, targets, engine="fast")


@pytest.mark.parametrize(("n", "v"), [(4096, 32128), (16384, 32128), (4096, 250112), (65536, 32128)])
@pytest.mark.parametrize("workspace_mb", [0.0, 256.0])
def test_slices_of_the_vocabulary_stay_within_the_workspace(n, v, workspace_mb):
    pytest.importorskip("triton")
    from sbs_edge.kernels.chunks import COLUMN_STEP, LEAST_COLUMNS, plan_columns

    width, itemsize = 768, 2
    columns = plan_columns(n, v, width, itemsize, workspace_mb)
    assert columns % COLUMN_STEP == 0
    fixed = n * width * (itemsize + 4)
    if workspace_mb and fixed < workspace_mb * 2**20:
        assert fixed + n * columns * itemsize <= workspace_mb * 2**20
        assert fixed + n * (columns + COLUMN_STEP) * itemsize > workspace_mb * 2**20 or columns == v
    if not workspace_mb:
        assert columns >= min(v, LEAST_COLUMNS)
        assert n * columns * itemsize <= max(48 << 20, n * LEAST_COLUMNS * itemsize)
    assert plan_columns(n, 5, width, itemsize, workspace_mb) == 5


class _Sizes(TorchDispatchMode):
    """Remembers the largest tensor that any operator returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(made, torch.Tensor):
                self.largest = max(self.largest, made.numel())
        return out


@pytest.mark.parametrize("need", [(True, True, True), (False, False, False)], ids=["gradients", "forward"])
def test_the_torch_engine_makes_no_tensor_of_rows_times_classes(need):
    n, d, v, mib = 512, 8, 4096, 1.0
    hidden, weight, targets = torch.randn(n, d), torch.randn(v, d), torch.randint(0, v, (n,))
    plan = plan_rows(targets, None, None, None, torch.ones(1), None, -100)
    with _Sizes() as sizes:
        torch_engine.forward(
            Inputs(hidden, weight, torch.randn(v)),
            plan,
            Options(0.1, 0.01, 0.5, workspace_mb=mib),
            Need(*need),
        )
    assert v * d <= sizes.largest <= mib * 2**20 / 4 < n * v / 4


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class _Head(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(11, 8))

    def forward(self, hidden, targets):
        return fused_linear_cross_entropy(hidden, self.weight, targets).total


def test_sharded_weights_are_refused_and_gathered_ones_work(one_rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    hidden, targets = torch.randn(5, 8), torch.tensor([1, 10, -100, 3, 4])
    plain = _Head()
    expected = plain(hidden, targets)
    expected.backward()
    sharded = fully_shard(_Head(), mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(TypeError, match=r"weight is a sharded DTensor.*weight\.full_tensor\(\)"):
        fused_linear_cross_entropy(hidden, sharded.weight, targets)
    for module in (sharded, DistributedDataParallel(_Head())):
        total = module(hidden, targets)
        total.backward()
        (gradient,) = (p.grad for p in module.parameters())
        gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        assert torch.equal(total, expected)
        assert torch.equal(gradient, plain.weight.grad)


def test_an_empty_weight_and_odd_options_are_refused():
    hidden, targets = torch.randn(2, 4), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="ZeRO-3: GatheredParameters"):
        fused_linear_cross_entropy(hidden, torch.empty(0), targets)
    for wrong in ({"logit_scale": 0.0}, {"workspace_mb": 0.0}, {"softcap": -1.0}, {"label_smoothing": 1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            fused_linear_cross_entropy(hidden, torch.randn(3, 4), targets, **wrong)


def test_debug_names_a_bad_weight_and_bad_indices():
    hidden, weight, targets = torch.randn(3, 4), torch.randn(3, 4), torch.tensor([0, 1, -100])
    with pytest.raises(ValueError, match="Row 1 is bad: its row weight is negative"):
        fused_linear_cross_entropy(
            hidden, weight, targets, row_weights=torch.tensor([1.0, -1.0, -1.0]), debug=True
        )
    with pytest.raises(ValueError, match="valid_indices must be the rows"):
        fused_linear_cross_entropy(hidden, weight, targets, valid_indices=torch.tensor([0]), debug=True)
    broken = hidden.clone()
    broken[1, 2] = torch.inf
    with pytest.raises(ValueError, match="Row 1 is bad: its hidden state is not finite"):
        fused_linear_cross_entropy(broken, weight, targets, debug=True)
