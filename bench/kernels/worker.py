"""All losses of one case in one process of their own; the protocol of :mod:`sbs_edge.bench.core.worker`.

{"do": "open", "truth"}                    -> sizes, the engine ``auto`` takes, plain torch's error
{"do": "prepare", "peer", "variant", "check"} -> ms of the first call (compiling included), its errors
{"do": "time", "peer", "variant", "what", "calls"} -> ms of each call on the device and on the host
{"do": "graph", "peer", "variant", "calls"} -> the same for replays of a captured forward + backward pass
{"do": "roof", "repeats"}                  -> rate of the three slice products
{"do": "memory", "peer", "variant"}        -> extra peak of a forward and of a forward + backward pass
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from sbs_edge.bench.core.footprint import memory_mb
from sbs_edge.bench.core.worker import serve
from sbs_edge.bench.kernels.cases import Case, Inputs, make_inputs
from sbs_edge.bench.kernels.peers import FLOOR, PEERS, Loss, auto_engine
from sbs_edge.bench.peers.system import Spec

__all__ = ["CaseRunner"]

_MIB = float(1 << 20)


class CaseRunner:
    """The tensors of one case, the prepared losses, and what is asked of them."""

    def __init__(self, spec: Spec) -> None:
        import torch

        given = spec.options
        torch.set_num_threads(spec.threads)
        self.torch = torch
        self.case = Case(**given["case"])
        self.seed = int(given["seed"])
        self.device = torch.device(given["device"])
        self.dtype = self.case.states
        student = given.get("student")
        padded = make_inputs(self.case, self.device, self.seed, Path(student) if student else None)
        compacted = padded.compacted() if self.case.padding else padded
        self.inputs = dict(zip(self.case.variants, (padded, compacted), strict=False))
        self.compacted = compacted
        self.losses: dict[str, Loss] = {}
        self.truth: Any = None
        self._clock: Any = None

    @property
    def clock(self) -> Any:
        """Made when first needed: its flush buffer would count as memory on a CPU."""
        from sbs_edge.bench.kernels.matmul_peak import Clock

        if self._clock is None:
            self._clock = Clock(self.device)
        return self._clock

    def precision(self) -> AbstractContextManager[Any]:
        """Autocast where the case asks for it; its casts are repeated in every pass, as in every step."""
        if not self.case.amp:
            return nullcontext()
        return self.torch.autocast(self.device.type, self.dtype)

    def forward(self, peer: str, inputs: Inputs) -> Any:
        """One pass without gradients."""
        with self.torch.no_grad(), self.precision():
            if peer == FLOOR:
                return inputs.hidden @ inputs.weight.t()
            return self.losses[peer](inputs)

    def step(self, peer: str, inputs: Inputs) -> tuple[Any, Any, Any]:
        """Loss, dX and dW of one pass; of the three products, the two that have gradients' shapes."""
        if peer == FLOOR:
            with self.torch.no_grad(), self.precision():
                wide = inputs.hidden @ inputs.weight.t()
                return None, wide @ inputs.weight, wide.t() @ inputs.hidden
        with self.precision():
            loss = self.losses[peer](inputs)
        scale = 1.0 if self.truth is None else self.truth.scale
        # Filled on the device: a copy from the host could not be captured.
        grads = self.torch.autograd.grad(loss, (inputs.hidden, inputs.weight), loss.new_full((), scale))
        return loss.detach(), grads[0], grads[1]

    def _prepare(self, peer: str, variant: str, check: bool) -> dict[str, Any]:
        adapter, inputs = PEERS[peer], self.inputs[variant]
        if adapter.gpu_only and self.device.type != "cuda":
            raise RuntimeError("runs on NVIDIA GPUs only")
        if peer not in self.losses:
            self.losses[peer] = adapter.prepare(self.device, self.dtype)
        before = time.perf_counter_ns()
        found = self.step(peer, inputs)
        self.clock.wait()
        reply: dict[str, Any] = {"first_ms": (time.perf_counter_ns() - before) / 1e6}
        if check and peer != FLOOR:
            reply["errors"] = self.truth.errors(*found, inputs)
        del found
        self.forward(peer, inputs)
        self.clock.wait()
        return reply

    def _time(self, call: Callable[[], Any], calls: int, warm: int) -> dict[str, Any]:
        for _ in range(warm):
            call()
        gc.disable()  # as timeit does; a collection over torch's own objects takes longer than many losses
        try:
            both = [self.clock.ms(call) for _ in range(calls)]
        finally:
            gc.enable()
        return {"ms": [took for took, _ in both], "host_ms": [host for _, host in both]}

    def _graph(self, peer: str, inputs: Inputs, calls: int) -> dict[str, Any]:
        """Time replays of one captured step: what is left when launching costs the host nothing."""
        cuda = self.torch.cuda
        gc.collect()
        aside = cuda.Stream(self.device)
        aside.wait_stream(cuda.current_stream(self.device))
        with cuda.stream(aside):
            self.step(peer, inputs)  # libraries' work areas and lazy modules cannot be made in a capture
        cuda.current_stream(self.device).wait_stream(aside)
        graph = cuda.CUDAGraph()
        with cuda.graph(graph, stream=aside):
            held = self.step(peer, inputs)
        try:
            return self._time(graph.replay, calls, warm=2)
        finally:
            del held
            graph.reset()

    def _gpu_memory(self, peer: str, inputs: Inputs) -> dict[str, float]:
        cuda, found = self.torch.cuda, {}
        for what, call in (("forward", self.forward), ("step", self.step)):
            gc.collect()
            self.clock.wait()
            cuda.empty_cache()
            cuda.reset_peak_memory_stats(self.device)
            before, held = cuda.memory_allocated(self.device), cuda.memory_reserved(self.device)
            result = call(peer, inputs)
            self.clock.wait()
            found[what] = (cuda.max_memory_allocated(self.device) - before) / _MIB
            found[f"{what}_reserved"] = (cuda.max_memory_reserved(self.device) - held) / _MIB
            del result
        found["step"] -= self._gradient_mib(inputs)
        return found

    def _gradient_mib(self, inputs: Inputs) -> float:
        return sum(x.numel() * x.element_size() for x in (inputs.hidden, inputs.weight)) / _MIB

    def _cpu_memory(self, peer: str, inputs: Inputs) -> dict[str, float]:
        """Growth of this process's high-water mark; meant for a process that did nothing before."""
        # Blocks of 128 KiB and more come from the system and go back to it at once: what one call freed
        # would otherwise serve the next one and hide its need.
        allocator = getattr(ctypes.CDLL(None), "mallopt", None)
        if allocator is not None:
            allocator(-3, 128 << 10)  # M_MMAP_THRESHOLD
        case = self.case
        few = Case(min(case.n, 256), case.d, min(case.v, 4096), case.dtype)
        small = make_inputs(few, self.device, self.seed)
        self.losses.setdefault(peer, PEERS[peer].prepare(self.device, self.dtype))
        for call in (self.forward, self.step):  # the libraries' own buffers are not the method's
            call(peer, small)
        del small
        found: dict[str, float] = {}
        for what, call in (("forward", self.forward), ("step", self.step)):
            before = _reset_high_water()
            result = call(peer, inputs)
            found[what] = max(0.0, memory_mb()["peak_rss_mb"] - before) * 1e6 / _MIB
            del result
        found["step"] = max(0.0, found["step"] - self._gradient_mib(inputs))
        return found

    def answer(self, order: dict[str, Any]) -> dict[str, Any]:
        """Carry out one command."""
        do = order["do"]
        if do == "open":
            return self._open(order.get("truth", True))
        if do == "roof":
            return self._roof(order["repeats"])
        peer, variant = order["peer"], order["variant"]
        if do == "prepare":
            return self._prepare(peer, variant, order["check"])
        inputs = self.inputs[variant]
        if do == "time":
            call = {"forward": self.forward, "step": self.step}[order["what"]]
            return self._time(lambda: call(peer, inputs), order["calls"], order["warm"])
        if do == "graph":
            return self._graph(peer, inputs, order["calls"])
        if do == "memory":
            measure = self._gpu_memory if self.device.type == "cuda" else self._cpu_memory
            return dict(measure(peer, inputs))
        raise ValueError(f"unknown command {do!r}")

    def _open(self, truth: bool) -> dict[str, Any]:
        from sbs_edge.bench.kernels.reference_error import measure_truth

        if truth:
            self.truth = measure_truth(self.compacted, self.seed)
        found: dict[str, Any] = {
            "rows": len(self.inputs[self.case.variants[0]].hidden),
            "auto": auto_engine(self.device, self.dtype),
            "epsilon": self.torch.finfo(self.dtype).eps,
        }
        if truth:
            found |= {
                "plain": self.truth.plain,
                "loss": self.truth.loss,
                "loss_scale": self.truth.scale,
                "rows_compared": len(self.truth.rows),
                "classes_compared": len(self.truth.classes),
            }
        if self.device.type == "cuda":
            found["device_name"] = self.torch.cuda.get_device_name(self.device)
            found["capability"] = list(self.torch.cuda.get_device_capability(self.device))
        return found

    def _roof(self, repeats: int) -> dict[str, Any]:
        from sbs_edge.bench.kernels.matmul_peak import product_rates, slice_width

        case = self.case
        width = slice_width(case.n, case.v, self.dtype.itemsize, self.device.type)
        return product_rates(self.clock, case.n, case.d, width, self.dtype, repeats)


def _reset_high_water() -> float:
    """Set the high-water mark to what is held now, where the system lets us; what is held, in MB."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return memory_mb()["peak_rss_mb"]
    return memory_mb()["rss_mb"]


if __name__ == "__main__":
    serve(lambda spec: CaseRunner(spec).answer)
