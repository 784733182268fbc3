"""Errors of a loss and its gradients against float64, judged by plain torch's own error.

Both are computed here a block of rows at a time, from the same rounded inputs, so that they exist where
full logits do not fit. Rows of dX and rows of dW (one a class) are subsampled at large sizes; half of the
classes looked at are targets, where most of the gradient lies.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sbs_edge.bench.kernels.cases import Inputs

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["LIMIT", "Truth", "judge", "loss_scale", "measure_truth"]

LIMIT = 2.0  # times plain torch's error in the same precision
_ROWS, _CLASSES = 512, 2048
_BLOCK_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}


@dataclass(slots=True)
class Truth:
    """The exact loss and gradients of a batch, and how far plain torch is from them.

    Attributes:
        scale: factor on the loss before its gradient is taken, as a loss scaler would set it.
        loss: exact mean loss, in nats, without the factor.
        rows: positions among the rows that count whose dX is compared.
        classes: classes whose row of dW is compared.
        grad_hidden: exact dX of ``rows``, float64.
        grad_weight: exact dW of ``classes``, float64.
        plain: errors of plain torch in the input's precision, as :meth:`errors` gives them.
    """

    scale: float
    loss: float
    rows: Tensor
    classes: Tensor
    grad_hidden: Tensor
    grad_weight: Tensor
    plain: dict[str, float]

    def errors(
        self, loss: Tensor, grad_hidden: Tensor, grad_weight: Tensor, inputs: Inputs
    ) -> dict[str, float]:
        """Errors of a result for ``inputs``, which may hold ignored rows: their gradient must be zero."""
        import torch

        kept = inputs.valid.index_select(0, self.rows)
        found = self._errors(
            float(loss), grad_hidden.index_select(0, kept), grad_weight.index_select(0, self.classes)
        )
        ignored = torch.ones(len(grad_hidden), dtype=torch.bool, device=grad_hidden.device)
        ignored[inputs.valid] = False
        if bool(ignored.any()):
            found["ignored_rows"] = float(grad_hidden[ignored].abs().max())
        return found

    def _errors(self, loss: float, grad_hidden: Tensor, grad_weight: Tensor) -> dict[str, float]:
        found = {"loss": abs(loss - self.loss) / max(abs(self.loss), 1e-30)}
        for name, mine, exact in (
            ("hidden", grad_hidden.double(), self.grad_hidden),
            ("weight", grad_weight.double(), self.grad_weight),
        ):
            size = exact.norm().clamp(min=1e-300)
            found[f"{name}_rel_l2"] = float((mine - exact).norm() / size)
            found[f"{name}_max_abs"] = float((mine - exact).abs().max()) / self.scale
            found[f"{name}_cosine"] = float((mine * exact).sum() / (mine.norm() * size).clamp(min=1e-300))
        found["gradient"] = max(found["hidden_rel_l2"], found["weight_rel_l2"])
        return found


def loss_scale(dtype: torch.dtype, n: int) -> float:
    """Return the factor under which float16 gradients neither vanish nor overflow; 1 elsewhere.

    A mean over n rows of V classes has gradients near 1 / (n V), below float16's smallest number; 2^15 is
    the largest power of two that float16 itself holds.
    """
    import torch

    return float(min(2**15, 16 * n)) if dtype == torch.float16 else 1.0


def _pass(
    inputs: Inputs, dtype: torch.dtype, scale: float, rows: Tensor, classes: Tensor
) -> tuple[float, Tensor, Tensor]:
    """Loss, dX of ``rows`` and dW of ``classes`` by plain torch in ``dtype``, a block of rows at a time."""
    import torch
    import torch.nn.functional as F

    hidden, weight = inputs.hidden.detach().to(dtype), inputs.weight.detach().to(dtype)
    n, v = len(hidden), len(weight)
    block = max(1, _BLOCK_BYTES.get(hidden.device.type, 256 << 20) // (v * 8 * 4))
    total = 0.0
    slopes = torch.empty((n, len(classes)), dtype=dtype, device=hidden.device)
    grad_hidden = torch.empty((len(rows), hidden.shape[1]), dtype=dtype, device=hidden.device)
    for start in range(0, n, block):
        stop = min(start + block, n)
        logits = (hidden[start:stop] @ weight.t()).requires_grad_()
        loss = F.cross_entropy(logits, inputs.targets[start:stop], reduction="sum")
        (slope,) = torch.autograd.grad(loss, logits, loss.new_tensor(scale / n))
        total += float(F.cross_entropy(logits.detach().double(), inputs.targets[start:stop], reduction="sum"))
        slopes[start:stop] = slope.index_select(1, classes)
        here = ((rows >= start) & (rows < stop)).nonzero().squeeze(1)
        # The whole block, though few of its rows are kept: a product of one row sums in another order.
        grad_hidden[here] = (slope @ weight).index_select(0, rows[here] - start)
    return total / n, grad_hidden, slopes.t() @ hidden


def measure_truth(inputs: Inputs, seed: int) -> Truth:
    """Compute the exact result for a batch without ignored rows, and plain torch's error."""
    import torch

    device, dtype = inputs.hidden.device, inputs.hidden.dtype
    n, v = len(inputs.hidden), len(inputs.weight)
    generator = torch.Generator().manual_seed(seed + 1)
    rows = torch.randperm(n, generator=generator)[:_ROWS].sort().values.to(device)
    if v <= _CLASSES:
        classes = torch.arange(v, device=device)
    else:
        some = torch.randperm(n, generator=generator)[: _CLASSES // 2].to(device)
        spread = torch.randint(0, v, (_CLASSES // 2,), generator=generator).to(device)
        classes = torch.cat([inputs.targets.index_select(0, some), spread]).unique()
    scale = loss_scale(dtype, n)
    loss, grad_hidden, grad_weight = _pass(inputs, torch.float64, scale, rows, classes)
    truth = Truth(scale, loss, rows, classes, grad_hidden, grad_weight, {})
    truth.plain = truth._errors(*_pass(inputs, dtype, scale, rows, classes))
    return truth


def judge(errors: dict[str, Any], plain: dict[str, float], epsilon: float) -> str | None:
    """Say why a result fails the tolerance, or return None.

    The error of dX, of dW and of the loss may be twice plain torch's. Plain torch may be exact by luck:
    an eighth of the precision's ``epsilon`` counts as its least gradient error; one epsilon (the rounding
    of a loss that is returned in it), at least 1e-6 (a float32 sum in another order), as that of its loss.
    """
    for name, floor in (
        ("hidden_rel_l2", epsilon / 8),
        ("weight_rel_l2", epsilon / 8),
        ("loss", max(epsilon, 1e-6)),
    ):
        limit = LIMIT * max(plain[name], floor)
        if not errors[name] <= limit:
            what = {"hidden_rel_l2": "dX", "weight_rel_l2": "dW", "loss": "loss"}[name]
            return f"its {what} is off by {errors[name]:.1e}; {LIMIT:g} x plain torch's error is {limit:.1e}"
    if errors.get("ignored_rows", 0.0) != 0.0:
        return f"ignored rows get a gradient of up to {errors['ignored_rows']:.1e}"
    return None
