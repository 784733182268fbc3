"""The registered operators behind :func:`sbs_edge.kernels.cross_entropy.fused_linear_cross_entropy`.

They are registered so that ``torch.compile(fullgraph=True)`` sees one opaque node with known shapes, autocast
does not change it, and gradient checkpointing can run it again. All engines share the two operators. The
``torch`` and ``cublas`` engines compute the gradients of the total in the forward operator and scale them
in the backward operator, as does the ``triton`` engine over chunks of rows. Over chunks of the vocabulary it
keeps a few numbers per row and computes the gradients in the backward operator. There are only first derivatives;
a second one raises an error.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from sbs_edge.kernels import chunks, engines
from sbs_edge.kernels.plan import Gradients, Inputs, Need, Options, Result, RowPlan, plan_rows, segment_means
from sbs_edge.kernels.products import full_precision

try:
    from torch.fx.experimental.symbolic_shapes import guard_or_false as _guard_or_false
except ImportError:  # before torch 2.8

    def _guard_or_false(a: bool | torch.SymBool) -> bool:
        return bool(a)


__all__ = ["apply"]

_MODULES = {
    "torch": "torch_engine", "cublas": "cublas_engine", "vocab_chunks": "triton_vocab", "row_chunks": "triton_rows"
}  # fmt: skip


class Arguments(NamedTuple):
    """The arguments of the forward operator, flat as in its schema; see the public function."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    valid_indices: Tensor | None
    segment_ids: Tensor | None
    row_weights: Tensor | None
    lambdas: Tensor
    denominators: Tensor | None
    ignore_index: int
    label_smoothing: float
    z_loss: float
    logit_scale: float
    softcap: float
    workspace_mb: float
    count_correct: bool
    engine: str
    chunks: str
    need_hidden: bool
    need_weight: bool
    need_bias: bool

    @property
    def inputs(self) -> Inputs:
        """Return the differentiable inputs."""
        return Inputs(self.hidden, self.weight, self.bias)

    @property
    def options(self) -> Options:
        """Return the scalar options."""
        return Options(*(getattr(self, name) for name in Options._fields))

    @property
    def need(self) -> Need:
        """The inputs that need a gradient."""
        return Need(self.need_hidden, self.need_weight, self.need_bias)


class BackwardArguments(NamedTuple):
    """The arguments of the backward operator.

    ``rows`` (2, R) int64 are indices and targets, ``stats`` (3, R) float32 the largest score, the sum and
    the factor of the valid rows. They come first; ``n_valid`` () int64 on the CPU says how many there are
    where the caller did not, else it is empty.
    """

    grad_total: Tensor
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    rows: Tensor
    stats: Tensor
    n_valid: Tensor
    label_smoothing: float
    z_loss: float
    logit_scale: float
    softcap: float
    workspace_mb: float
    count_correct: bool
    need_hidden: bool
    need_weight: bool
    need_bias: bool


_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor", Tensor | None: "Tensor?", int: "SymInt", float: "float", bool: "bool", str: "str"
}  # fmt: skip


def _schema(arguments: type, n_outputs: int) -> str:
    taken = [f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in get_type_hints(arguments).items()]
    return f"({', '.join(taken)}) -> ({', '.join(['Tensor'] * n_outputs)})"


def _implementation(given: Arguments) -> str:
    """Return a key of ``_MODULES``; called for real and for fake tensors."""
    name = engines.resolve(given.engine, given.hidden.device, given.hidden.dtype)
    if name != "triton":
        return name
    if not any(given.need):  # no gradient needs exponentials
        return "vocab_chunks"
    if given.chunks:
        return given.chunks
    hidden, weight, _ = given.inputs
    least = chunks.switch_rows(
        int(weight.shape[0]), int(weight.shape[1]), hidden.dtype.itemsize, weight.dtype.itemsize,
        float(given.workspace_mb), given.softcap > 0,
    )  # fmt: skip
    return "row_chunks" if hidden.shape[0] >= least else "vocab_chunks"


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Switch autocast off: the engine chooses its own precision, and autocast would change its products to 16 bits."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _saved_rows(given: Arguments, plan: RowPlan, result: Result) -> list[Tensor]:
    """Return (rows, stats, n_valid) for the backward operator, which then need not find and plan the rows again.

    Their shapes must be known before the rows: without ``valid_indices`` they have space for all rows.
    """
    assert result.stats is not None
    n_valid = plan.indices.shape[0]
    known = given.valid_indices is not None
    room = n_valid if known else given.targets.shape[0]
    rows = plan.indices.new_zeros((2, room))
    rows[0, :n_valid], rows[1, :n_valid] = plan.indices, plan.targets
    stats = result.stats.new_zeros((3, room))
    stats[:2, :n_valid], stats[2, :n_valid] = result.stats, plan.grad_factor
    return [rows, stats, torch.empty(0, dtype=torch.int64) if known else torch.tensor(n_valid)]


def _forward_impl(*flat: Any) -> tuple[Tensor, ...]:
    """Return (total, means, counts, correct) and three tensors for the backward pass, empty if unused."""
    given = Arguments(*flat)
    lambdas = given.lambdas
    plan = plan_rows(
        given.targets, given.valid_indices, given.segment_ids, given.row_weights, lambdas, given.denominators,
        given.ignore_index,
    )  # fmt: skip
    name = _implementation(given)
    engine = import_module(f"sbs_edge.kernels.{_MODULES[name]}")
    with _without_autocast(given.hidden.device), full_precision():
        result: Result = engine.forward(given.inputs, plan, given.options, given.need)
    if name == "vocab_chunks" and any(given.need):
        saved = _saved_rows(given, plan, result)
    else:
        saved = [lambdas.new_empty(0) if grad is None else grad for grad in result.gradients]
    means, correct = segment_means(plan, result.losses, result.correct, lambdas.shape[0])
    total = (means * lambdas).masked_fill(lambdas == 0, 0.0).sum()
    return (total, means, plan.counts, correct, *saved)


def _forward_fake(*flat: Any) -> tuple[Tensor, ...]:
    given = Arguments(*flat)
    lambdas, hidden = given.lambdas, given.hidden
    counts = lambdas.new_empty(lambdas.shape, dtype=torch.int64)
    name = _implementation(given)
    if name == "vocab_chunks" and any(given.need):
        known = given.valid_indices
        room = given.targets.shape[0] if known is None else known.shape[0]
        shape = () if known is None else (0,)
        saved = [
            counts.new_empty((2, room)), lambdas.new_empty((3, room)),
            torch.empty(shape, dtype=torch.int64, device="cpu"),
        ]  # fmt: skip
    else:
        kept = hidden.dtype if name == "row_chunks" and hidden.dtype != torch.float16 else lambdas.dtype
        shapes = (hidden.shape, given.weight.shape, given.weight.shape[:1])
        saved = [
            lambdas.new_empty(shape if need else (0,), dtype=kind if need else lambdas.dtype)
            for shape, need, kind in zip(
                shapes, given.need, (kept, lambdas.dtype, lambdas.dtype), strict=True
            )
        ]
    return (lambdas.new_empty(()), torch.empty_like(lambdas), counts, torch.empty_like(counts), *saved)


def _backward_impl(*flat: Any) -> tuple[Tensor, ...]:
    """Return the gradients selected by ``need_*`` in their tensors' types, by chunks of the vocabulary; others are empty."""
    from sbs_edge.kernels import triton_vocab

    given = BackwardArguments(*flat)
    n_valid = int(given.n_valid) if given.n_valid.numel() else given.rows.shape[1]
    rows, stats = given.rows[:, :n_valid], given.stats[:, :n_valid]
    with _without_autocast(given.hidden.device), full_precision():
        grads = triton_vocab.backward(
            given.grad_total,
            Inputs(given.hidden, given.weight, given.bias),
            triton_vocab.SavedRows(rows[0], rows[1], stats[0], stats[1], stats[2]),
            Options(*(getattr(given, name) for name in Options._fields)),
            Need(given.need_hidden, given.need_weight, given.need_bias),
        )
    return tuple(given.stats.new_empty(0) if grad is None else grad for grad in grads)


def _backward_fake(*flat: Any) -> tuple[Tensor, ...]:
    given = BackwardArguments(*flat)
    needed = zip(flat[1:4], flat[-3:], strict=True)
    return tuple(
        tensor.new_empty(tensor.shape) if need and tensor is not None else given.stats.new_empty(0)
        for tensor, need in needed
    )


_forward = torch.library.custom_op(
    "sbs_edge::fused_linear_cross_entropy", _forward_impl, mutates_args=(), schema=_schema(Arguments, 7)
)
_forward.register_fake(_forward_fake)
_gradients = torch.library.custom_op(
    "sbs_edge::fused_linear_cross_entropy_backward",
    _backward_impl,
    mutates_args=(),
    schema=_schema(BackwardArguments, 3),
)
_gradients.register_fake(_backward_fake)


class _FirstDerivative(torch.autograd.Function):
    """The identity on a gradient that must not be differentiated again; it depends on ``sources``."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise NotImplementedError(
            "fused_linear_cross_entropy has first derivatives only. For a gradient of its gradient (gradient "
            "penalties, Hessians) use engine='reference', which holds full logits."
        )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given = Arguments(*inputs)
    ctx.need, ctx.options = given.need, given.options
    saved = output[4:]
    ctx.recompute = saved[0].dtype == torch.int64
    # A hook keeps the tensors that it packed: scaling in place would change them.
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    ctx.hooked = hooks is None or hooks(False) is not None
    ctx.save_for_backward(*given.inputs, *saved)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _graph_ends_here(ctx: Any, grad_total: Tensor) -> bool:
    """Return whether nothing can use the saved gradients again, so that they may be scaled in place.

    They were never returned, and a graph that autograd is about to free has no second backward pass. With
    ``retain_graph``, hooks on saved tensors, a compiler or ``vmap``, they are copied instead.
    """
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    if keeps is None or ctx.hooked or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    batched = "Batched" in str(torch._C._dispatch_keys(grad_total))  # not every vmap's key has a name here
    return type(grad_total) is Tensor and not batched and not keeps()


def _scaled(saved: Tensor, grad_total: Tensor) -> Tensor:
    """Return ``saved`` times the total's gradient, in place; on a CPU a factor of 1 needs no pass."""
    if grad_total.device.type == "cpu" and grad_total == 1.0:
        return saved
    return saved.mul_(grad_total)


def _backward(ctx: Any, grad_total: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing: list[Tensor | None] = [None] * len(Arguments._fields)
    if grad_total is None or not any(ctx.need):
        return tuple(nothing)
    unpacked = ctx.saved_tensors  # read once, because checkpointing does not allow a second read
    inputs, saved = Inputs(*unpacked[:3]), unpacked[3:]
    twice = torch.is_grad_enabled()
    owned = _graph_ends_here(ctx, grad_total)
    with torch.no_grad():
        if ctx.recompute:
            grads = Gradients(*_gradients(grad_total, *inputs, *saved, *ctx.options, *ctx.need))
        else:
            # Scaled in the accumulator's precision, then rounded once: exact for any loss scale.
            grads = Gradients(*(
                (_scaled(gradient, grad_total) if owned else gradient * grad_total).to(tensor.dtype)
                if need and tensor is not None else None
                for tensor, gradient, need in zip(inputs, saved, ctx.need, strict=True)
            ))  # fmt: skip
    for position, (gradient, need) in enumerate(zip(grads, ctx.need, strict=True)):
        if need and gradient is not None:
            nothing[position] = _FirstDerivative.apply(gradient, grad_total, *inputs) if twice else gradient
    return tuple(nothing)


_forward.register_autograd(_backward, setup_context=_setup_context)


def apply(
    inputs: Inputs,
    targets: Tensor,
    valid_indices: Tensor | None,
    segment_ids: Tensor | None,
    row_weights: Tensor | None,
    lambdas: Tensor,
    denominators: Tensor | None,
    ignore_index: int,
    options: Options,
    engine: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the operator of ``engine``; gradients are computed only if autograd needs them."""
    recording = torch.is_grad_enabled()
    need = Need(*(recording and tensor is not None and tensor.requires_grad for tensor in inputs))
    # A compiler that does not know the number of rows cannot compare it with the number of classes.
    asked = chunks.asked() or ("" if _guard_or_false(inputs.hidden.shape[0] > 1) else "vocab_chunks")
    out = _forward(
        *inputs, targets, valid_indices, segment_ids, row_weights, lambdas, denominators, ignore_index, *options,
        engine, asked, *need,
    )  # fmt: skip
    return out[0], out[1], out[2], out[3]
