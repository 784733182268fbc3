"""One training step in a process of its own; the protocol of :mod:`sbs_edge.bench.core.worker`.

{"do": "open"}                     -> memory with model and data, before any step
{"do": "curve", "steps"}           -> the loss of each step of a fresh model
{"do": "step", "seconds", ...}     -> ns of each optimizer step (forward, backward, clip, AdamW)
{"do": "epoch"}                    -> ns of one pass over all examples
{"do": "padding"}                  -> positions held and used over an epoch
{"do": "peak"}                     -> peak memory so far
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

from sbs_edge.bench.core.footprint import memory_mb
from sbs_edge.bench.core.worker import serve, timed
from sbs_edge.bench.peers.system import Spec

__all__ = ["Trainer"]


class Trainer:
    """A model, its optimizer and the batches, for one kind of step."""

    def __init__(self, spec: Spec) -> None:
        import torch

        given = spec.options
        torch.set_num_threads(spec.threads)
        self.torch, self.spec, self.given = torch, spec, given
        self.device = torch.device(given["device"])
        self.bf16 = given["precision"] == "bf16"
        self.batches = self._batches()
        self.at = 0
        self._build()

    def _build(self) -> None:
        from transformers.utils import logging

        from sbs_edge.bench.core.shapes import random_model
        from sbs_edge.bench.training.steps import make_step

        logging.set_verbosity_error()
        # Without dropout, so that the losses of different steps can be compared.
        model = random_model(self.given["shape"], self.given["seed"], dropout_rate=0.0, use_cache=False)
        self.model = model.to(self.device).train()
        self.step = make_step(self.spec.system, self.model, self.given["rationale_weight"], self.device)
        self.optimizer = self.torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.01)

    def _batches(self) -> list[list[Any]]:
        from sbs_edge.bench.training.steps import Pair

        rows = json.loads(Path(self.given["pairs"]).read_text(encoding="utf-8"))
        pairs = [Pair(*row) for row in rows]
        random.Random(self.given["seed"]).shuffle(pairs)
        size = self.given["batch_size"]
        return [pairs[at : at + size] for at in range(0, len(pairs) - size + 1, size)]

    def one(self) -> float:
        """One optimizer step on the next batch; its loss."""
        torch = self.torch
        batch = self.batches[self.at % len(self.batches)]
        self.at += 1
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.step.loss(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return float(loss.detach())  # waits for the device, as any loop that logs does

    def answer(self, order: dict[str, Any]) -> dict[str, Any]:
        """Carry out one command."""
        do = order["do"]
        if do == "open":
            return dict(memory_mb())
        if do == "curve":
            self.at = 0
            self._build()
            return {"losses": [self.one() for _ in range(order["steps"])]}
        if do == "step":
            return {"ns": timed(self.one, order["seconds"], order["least"], order["warm"])}
        if do == "epoch":
            self.at = 0
            before = time.perf_counter_ns()
            for _ in self.batches:
                self.one()
            return {"ns": [time.perf_counter_ns() - before]}
        if do == "padding":
            total: dict[str, list[int]] = {}
            for batch in self.batches:
                for name, (held, used) in self.step.padding(batch).items():
                    so_far = total.setdefault(name, [0, 0])
                    so_far[0] += held
                    so_far[1] += used
            return {"padding": total, "steps": len(self.batches)}
        if do == "peak":
            found = memory_mb()
            if self.device.type == "cuda":
                found["device_peak_mb"] = self.torch.cuda.max_memory_allocated() / 1e6
            return dict(found)
        raise ValueError(f"unknown command {do!r}")


if __name__ == "__main__":
    serve(lambda spec: Trainer(spec).answer)
