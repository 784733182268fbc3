"""The compared losses behind one interface: ``prepare(device, dtype)`` returns ``loss(inputs)``.

Every loss is the mean over the rows that count. A peer that is not installed, or does not run here, raises
and becomes a row with that reason. ``floor`` is not a loss: it is the three bare products that no loss can avoid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sbs_edge.bench.kernels.cases import IGNORED, Inputs

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["FLOOR", "OURS", "PEERS", "Loss", "Peer", "auto_engine", "names_for"]

Loss = Callable[[Inputs], "Tensor"]
OURS = "sbs-edge:"
FLOOR = "three products"


@dataclass(frozen=True, slots=True)
class Peer:
    """One way to compute the loss.

    Attributes:
        note: a description for the table.
        prepare: imports what it needs and returns the loss; raises where it cannot run.
        gpu_only: it says itself that it runs on NVIDIA GPUs alone.
        slow_start: compiling takes most of a minute: not part of a quick run.
    """

    note: str
    prepare: Callable[[torch.device, torch.dtype], Loss]
    gpu_only: bool = False
    slow_start: bool = False


def _eager(logits_dtype: str | None) -> Callable[[torch.device, torch.dtype], Loss]:
    def prepare(device: torch.device, dtype: torch.dtype) -> Loss:
        import torch
        import torch.nn.functional as F

        if logits_dtype and dtype == torch.float32:
            raise RuntimeError("in float32 it is the same as eager")
        wide = torch.float32 if logits_dtype else dtype
        return lambda x: F.cross_entropy((x.hidden @ x.weight.t()).to(wide), x.targets, ignore_index=IGNORED)

    return prepare


def _compiled(options: dict[str, Any] | None) -> Callable[[torch.device, torch.dtype], Loss]:
    def prepare(device: torch.device, dtype: torch.dtype) -> Loss:
        import torch
        import torch.nn.functional as F

        def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy((hidden @ weight.t()).float(), targets, ignore_index=IGNORED)

        made: Any = torch.compile(plain, dynamic=False, options=options)
        return lambda x: made(x.hidden, x.weight, x.targets)

    return prepare


def _torch_fused(chunked: bool) -> Callable[[torch.device, torch.dtype], Loss]:
    def prepare(device: torch.device, dtype: torch.dtype) -> Loss:
        import torch
        import torch.nn.functional as F

        function = getattr(F, "linear_cross_entropy", None)
        if function is None:
            raise RuntimeError(f"torch {torch.__version__} has no nn.functional.linear_cross_entropy")
        given: dict[str, Any] = {"ignore_index": IGNORED}
        if chunked:
            given["options"] = torch.nn.LinearCrossEntropyOptions()
        return lambda x: function(x.hidden, x.weight, x.targets, **given)

    return prepare


def _liger(wide: bool) -> Callable[[torch.device, torch.dtype], Loss]:
    def prepare(device: torch.device, dtype: torch.dtype) -> Loss:
        import torch
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as function

        given: dict[str, Any] = {"accum_dtype": torch.float32} if wide else {}
        return lambda x: function(x.hidden, x.weight, x.targets, ignore_index=IGNORED, **given)

    return prepare


def _cce(implementation: str, **given: Any) -> Callable[[torch.device, torch.dtype], Loss]:
    def prepare(device: torch.device, dtype: torch.dtype) -> Loss:
        from cut_cross_entropy import linear_cross_entropy as function

        return lambda x: function(
            x.hidden, x.weight, x.targets, ignore_index=IGNORED, impl=implementation, **given
        )

    return prepare


def _quack(scaled_exponential: bool) -> Callable[[torch.device, torch.dtype], Loss]:
    def prepare(device: torch.device, dtype: torch.dtype) -> Loss:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy as function

        given: dict[str, Any] = {} if scaled_exponential else {"use_scaled_exp": False}
        return lambda x: function(x.hidden, x.weight, x.targets, ignore_index=IGNORED, **given)

    return prepare


def _ours(engine: str) -> Callable[[torch.device, torch.dtype], Loss]:
    def prepare(device: torch.device, dtype: torch.dtype) -> Loss:
        from sbs_edge.kernels.cross_entropy import fused_linear_cross_entropy
        from sbs_edge.kernels.engines import resolve

        resolve(engine, device, dtype)
        return lambda x: (
            fused_linear_cross_entropy(
                x.hidden, x.weight, x.targets, valid_indices=x.valid, ignore_index=IGNORED, engine=engine
            ).total
        )

    return prepare


def _floor(device: torch.device, dtype: torch.dtype) -> Loss:
    def loss(_inputs: Inputs) -> Tensor:
        raise RuntimeError("the three products alone give no loss")

    return loss


PEERS: dict[str, Peer] = {
    f"{OURS}torch": Peer("this project's slices in plain torch", _ours("torch")),
    f"{OURS}cublas": Peer("this project's slices, softmax in Triton", _ours("cublas")),
    f"{OURS}triton": Peer("this project's Triton tiles", _ours("triton")),
    "eager": Peer("full logits in the input's dtype, as transformers' T5 has them", _eager(None)),
    "eager-fp32-logits": Peer("full logits, cast to float32 before the loss", _eager("float32")),
    "torch-compile": Peer("the same, through torch.compile", _compiled(None), slow_start=True),
    "torch-compile-chunker": Peer(
        "torch.compile with inductor's automatic chunker",
        _compiled({"auto_chunker.enable": True}),
        slow_start=True,
    ),
    "torch-linear-ce": Peer("F.linear_cross_entropy as it comes", _torch_fused(False)),
    "torch-linear-ce-chunked": Peer("with LinearCrossEntropyOptions()", _torch_fused(True)),
    "liger": Peer("Liger's fused linear cross-entropy as it comes", _liger(False)),
    "liger-fp32-accum": Peer("the same with accum_dtype=float32", _liger(True)),
    "cce": Peer("Apple's Cut Cross-Entropy as it comes (filters gradients)", _cce("cce"), gpu_only=True),
    "cce-unfiltered": Peer(
        "the same without its filter, sums in the gradient's dtype",
        _cce("cce", filter_eps=None),
        gpu_only=True,
    ),
    "cce-kahan-full-c": Peer("its preset cce_kahan_full_c", _cce("cce_kahan_full_c"), gpu_only=True),
    "cce-exact": Peer("its preset cce_exact", _cce("cce_exact"), gpu_only=True),
    "quack": Peer("QuACK, its own choice of pipeline", _quack(True), gpu_only=True),
    "quack-base": Peer("QuACK without scaled exponentials", _quack(False), gpu_only=True),
    FLOOR: Peer("X W^T, P W and P^T X and nothing else, with full-size P", _floor),
}


def names_for(wanted: str, quick: bool = False) -> tuple[str, ...]:
    """Return the losses named in a list separated by commas, or ``all``; this project's come first.

    Raises:
        UsageError: a name is unknown.
    """
    from sbs_edge.errors import UsageError

    if wanted == "all":
        return tuple(name for name, peer in PEERS.items() if not (quick and peer.slow_start))
    given = [part.strip() for part in wanted.split(",") if part.strip()]
    unknown = [name for name in given if name not in PEERS]
    if unknown:
        raise UsageError(f"peers are {', '.join(PEERS)}; found {', '.join(unknown)}.")
    ours = [name for name in PEERS if name.startswith(OURS)]
    return tuple(dict.fromkeys([*ours, *given]))


def auto_engine(device: torch.device, dtype: torch.dtype) -> str:
    """Return the name of what ``engine="auto"`` takes here."""
    from sbs_edge.kernels.engines import select_engine

    return OURS + select_engine(device, dtype)
