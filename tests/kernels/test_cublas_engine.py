"""The cublas engine: values under Triton's interpreter, and ahead-of-time builds of its one kernel."""

import pytest
import torch

from sbs_edge.kernels.cross_entropy import fused_linear_cross_entropy

OPTIONS = [{}, {"label_smoothing": 0.1, "z_loss": 1e-2}, {"softcap": 3.0, "logit_scale": 0.5}]


@pytest.mark.interpreted
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "d", "v"), [(0, 8, 5), (1, 8, 5), (19, 16, 101), (12, 16, 384)], ids=str)
def test_the_error_is_at_most_twice_that_of_plain_torch(n, d, v, dtype, options):
    torch.manual_seed(0)
    rounded = [torch.randn(n, d).to(dtype), torch.randn(v, d).to(dtype), torch.randn(v).to(dtype)]
    targets = torch.randint(0, v, (n,))
    targets[1::3] = -100
    results = {}
    for engine, kind in (("reference", torch.float64), ("reference", dtype), ("cublas", dtype)):
        h, w, b = (x.to(kind).requires_grad_() for x in rounded)
        loss = fused_linear_cross_entropy(
            h, w, targets, bias=b, segment_ids=torch.arange(n) % 2, n_segments=2, engine=engine,
            segment_weights=(1.0, 0.3), workspace_mb=0.02, **options,
        )  # fmt: skip
        grads = torch.autograd.grad(loss.total * 3.0, (h, w, b), allow_unused=True)
        results[engine, kind] = [loss.total.detach().double(), *(g.double() for g in grads)]
    for exact, plain, mine in zip(
        results["reference", torch.float64],
        results["reference", dtype],
        results["cublas", dtype],
        strict=True,
    ):
        floor = torch.finfo(dtype).eps * exact.norm() + 1e-12
        assert (mine - exact).norm() <= 2 * torch.maximum((plain - exact).norm(), floor)


@pytest.mark.compiled
@pytest.mark.parametrize("capability", [75, 80, 86, 89, 90, 100, 103, 120])
def test_builds_ahead_of_time(capability, tmp_path, monkeypatch):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sbs_edge.kernels.cublas_engine import BLOCK, softmax_rows

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    signature = {
        "logits": "*fp32", "bias": "*fp16", "targets": "*i64", "factors": "*fp32", "losses": "*fp32", "hits": "*i8",
        "grads": "*fp16", "gains": "*fp32",
        "n_classes": "i32", "scale": "fp32", "smoothing": "fp32", "z_loss": "fp32", "softcap": "fp32",
        "HAS_BIAS": "constexpr", "HAS_CAP": "constexpr", "WRITE": "constexpr", "BLOCK_V": "constexpr",
    }  # fmt: skip
    constants = {"HAS_BIAS": True, "HAS_CAP": True, "WRITE": True, "BLOCK_V": BLOCK}
    source = ASTSource(softmax_rows, signature, constexprs=constants)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert f"sm_{capability}" in built.asm["ptx"]
    assert ".local" not in built.asm["ptx"]
    assert built.metadata.shared <= 48 * 1024
