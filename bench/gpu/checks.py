"""Check every engine against float64 on the device, before anything is timed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["SHAPES", "SMALL_SHAPES", "check_engines"]

# 7 rows of T5's unpadded vocabulary; ByT5's vocabulary, smaller than a tile; an odd count of T5 rows; two
# launches' worth of mT5's vocabulary.
SHAPES = ((7, 64, 32100), (513, 512, 384), (1000, 768, 32128), (2048, 768, 250112))
SMALL_SHAPES = ((7, 16, 33), (37, 32, 300))
SCALES = (1.0, 65536.0)
LAMBDAS = (1.0, 0.3)
LIMIT = 2.0


def _objective(h: Tensor, w: Tensor, targets: Tensor, segments: Tensor) -> Tensor:
    """Two weighted means over full logits, the cross-entropy itself in at least float32."""
    import torch
    import torch.nn.functional as F

    logits = h @ w.t()
    wide = logits if logits.dtype == torch.float64 else logits.float()
    each = F.cross_entropy(wide, targets, ignore_index=-100, reduction="none")
    total = each.new_zeros(())
    for k, factor in enumerate(LAMBDAS):
        mine = (segments == k) & (targets != -100)
        total = total + factor * each[mine].mean()
    return total


def _run(
    loss: Callable[[Tensor, Tensor], Tensor], h: Tensor, w: Tensor, dtype: torch.dtype, scale: float
) -> list[Tensor]:
    import torch

    a, b = (x.detach().to(dtype).requires_grad_() for x in (h, w))
    total = loss(a, b)
    grads = torch.autograd.grad(total, (a, b), total.new_tensor(scale))
    return [total.detach().double(), *(g.double() / scale for g in grads)]


def _errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((f - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True)]


def _shape(
    n: int, d: int, v: int, dtype: str, engines: list[str], device: torch.device, seed: int
) -> list[dict[str, Any]]:
    import torch

    from sbs_edge.kernels import chunks
    from sbs_edge.kernels.cross_entropy import fused_linear_cross_entropy

    low = getattr(torch, dtype)
    generator = torch.Generator(device=device).manual_seed(seed)
    h = torch.randn(n, d, generator=generator, device=device).to(low)
    w = torch.randn(v, d, generator=generator, device=device).mul_(d**-0.5).to(low)
    targets = torch.randint(0, v, (n,), generator=generator, device=device)
    targets[3::4] = -100
    segments = torch.arange(n, device=device) % 2

    def plain(a: Tensor, b: Tensor) -> Tensor:
        return _objective(a, b, targets, segments)

    exact = _run(plain, h, w, torch.float64, 1.0)
    rows = []
    for scale in SCALES:
        yardstick = _errors(_run(plain, h, w, low, scale), exact)
        for engine in engines:

            def ours(a: Tensor, b: Tensor, engine: str = engine) -> Tensor:
                name, _, order = engine.partition(", ")
                with chunks.use(order) if order else nullcontext():
                    return fused_linear_cross_entropy(
                        a,
                        b,
                        targets,
                        segment_ids=segments,
                        n_segments=2,
                        segment_weights=LAMBDAS,
                        engine=name,
                    ).total

            row: dict[str, Any] = {"engine": engine, "shape": f"{n},{d},{v}", "dtype": dtype, "scale": scale}
            try:
                first, second = (_run(ours, h, w, low, scale) for _ in range(2))
                errors = _errors(first, exact)
                floor = torch.finfo(low).eps / 8
                # The loss is one float32 number, which plain torch may have exactly by luck.
                floors = (max(floor, torch.finfo(torch.float32).eps / 2), floor, floor)
                ratios = [e / max(p, f) for e, p, f in zip(errors, yardstick, floors, strict=True)]
                same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
                row |= dict(zip(("loss error", "dX error", "dW error"), errors, strict=True))
                row |= dict(zip(("loss x plain", "dX x plain", "dW x plain"), ratios, strict=True))
                right = all(ratio <= LIMIT for ratio in ratios)
                row |= {"same bits again": same, "verdict": "right" if right else "WRONG"}
            except Exception as error:
                row["verdict"] = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
            rows.append(row)
    return rows


def check_engines(
    device: torch.device, small: bool, save: Callable[[list[dict[str, Any]]], None], seed: int = 0
) -> list[dict[str, Any]]:
    """Compare every engine with float64 for every dtype, shape and loss scale.

    Args:
        device: where.
        small: shapes for Triton's interpreter, which does not multiply bfloat16 correctly.
        save: takes all rows so far, after every shape.
        seed: seed of the inputs.

    Returns:
        A row for each engine, shape, dtype and scale; ``verdict`` is ``right``, ``WRONG`` or a reason.
    """
    import torch

    from sbs_edge.kernels.cross_entropy import available_engines
    from sbs_edge.kernels.tile_table import interpreted

    rows: list[dict[str, Any]] = []
    names = [status.name for status in available_engines() if status.available and status.name != "reference"]
    names += ["triton, row_chunks"] if "triton" in names else []  # its other order, whatever the shape
    for n, d, v in SMALL_SHAPES if small else SHAPES:
        for dtype in ("bfloat16", "float16", "float32"):
            skipped = [name for name in names if interpreted() and dtype == "bfloat16" and name != "torch"]
            rows += [
                {"engine": name, "shape": f"{n},{d},{v}", "dtype": dtype, "verdict": "left out: interpreter"}
                for name in skipped
            ]
            try:
                rows += _shape(n, d, v, dtype, [x for x in names if x not in skipped], device, seed)
            except torch.OutOfMemoryError:
                rows.append(
                    {"shape": f"{n},{d},{v}", "dtype": dtype, "verdict": "the reference does not fit"}
                )
            save(rows)
    return rows
