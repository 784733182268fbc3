"""Greedy decoding over an encoder graph and a step graph, for devices where a graph cannot contain the loop.

The encoder's cross-attention keys and values are computed once and bound once. The state between steps (token,
position, finished rows, log-probability, caches) is in two sets of buffers on the device: even steps read the
first and write the second, odd steps the other way round. So both bindings are made before the loop.
The host reads one token per row after each step, and the log-probabilities once, at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sbs_edge.errors import UsageError
from sbs_edge.runtime.ort import onnxruntime_module
from sbs_edge.runtime.sessions import Session

__all__ = ["StepLoop"]

_HOST_PROVIDERS = ("CPUExecutionProvider",)
_BFLOAT16 = 16  # onnx.proto's number; numpy has no such type
_TYPES: Mapping[str, Any] = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(bfloat16)": _BFLOAT16,
    "tensor(int64)": np.int64, "tensor(bool)": np.bool_,
}  # fmt: skip
_CONSTANT = ("attention_mask", "cross_")  # inputs that stay the same in all steps


def _output_of(name: str) -> str:
    """Return the output that has the next value of the input ``name``."""
    return name.replace("past_", "present_") if name.startswith("past_") else f"next_{name}"


class StepLoop:
    """The loop around two graphs. It is safe to share between threads, because each call has its own buffers."""

    def __init__(self, encoder: Session, step: Session, start_id: int, eos_id: int) -> None:
        """Bind the graphs.

        Args:
            encoder: ``input_ids, attention_mask (B, S) int64 -> cross_i``.
            step: what ``sbs_edge.export.graphs.step.build_decoder_step`` describes.
            start_id: the token that decoding starts with.
            eos_id: the token that ends a row.
        """
        self._encoder, self._step = encoder.inference, step.inference
        self._start, self._eos = start_id, eos_id
        inputs = self._step.get_inputs()
        self._carried = {i.name: i for i in inputs if not i.name.startswith(_CONSTANT)}
        self._room = int(self._carried["past_0"].shape[2])
        on_host = self._step.get_providers()[0] in _HOST_PROVIDERS
        self._device = "cpu" if on_host else "cuda"

    def run(self, ids: np.ndarray, mask: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """Decode a batch.

        Args:
            ids: (B, S) int64 tokens.
            mask: (B, S) int64, 0 where padded.
            limit: at most this many tokens per row, end-of-sequence included.

        Returns:
            (B, N) int64 tokens with padding after a row's end-of-sequence, N at most ``limit``, and the (B,)
            float32 sums of their log-probabilities: what the explainer graph of a CPU target returns.

        Raises:
            UsageError: ``limit`` is over the cache's length.
        """
        if limit > self._room:
            raise UsageError(
                f"max_new_tokens is {limit}, but this target's cache holds {self._room} tokens; ask for fewer, or "
                "export the bundle again from a student with a higher max_target_tokens."
            )
        batch = len(ids)
        attention = self._upload(mask)
        fixed = {"attention_mask": attention, **self._encode(ids, attention)}
        first, second = self._state(batch, fresh=True), self._state(batch)
        bindings = (self._binding(fixed, first, second), self._binding(fixed, second, first))
        written = np.empty((batch, limit), np.int64)
        finished = np.zeros(batch, np.bool_)
        length = 0
        while length < limit and not finished.all():
            self._step.run_with_iobinding(bindings[length % 2])
            state = first if length % 2 else second
            written[:, length] = state["token"].numpy()[:, 0]
            finished |= written[:, length] == self._eos
            length += 1
        return written[:, :length], state["score"].numpy()[:, 0]

    def _encode(self, ids: np.ndarray, attention: Any) -> dict[str, Any]:
        """Return cross-attention keys and values by the step graph's names, on the device."""
        binding = self._encoder.io_binding()
        binding.bind_ortvalue_input("input_ids", self._upload(ids))
        binding.bind_ortvalue_input("attention_mask", attention)
        names = [output.name for output in self._encoder.get_outputs()]
        for name in names:
            binding.bind_output(name, self._device, 0)
        self._encoder.run_with_iobinding(binding)
        return dict(zip(names, binding.get_outputs(), strict=True))

    def _state(self, batch: int, *, fresh: bool = False) -> dict[str, Any]:
        """Return buffers for the state between steps; ``fresh`` ones have the state before the first step.

        Caches stay uninitialised: a step reads only positions that an earlier step wrote.
        """
        onnxruntime = onnxruntime_module()

        made: dict[str, Any] = {}
        for name, value in self._carried.items():
            shape = [batch if isinstance(size, str) else size for size in value.shape]
            kind = _TYPES[value.type]
            if fresh and not name.startswith("past_"):
                made[name] = self._upload(np.full(shape, self._start if name == "token" else 0, kind))
            else:
                made[name] = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, kind, self._device, 0)
        return made

    def _binding(self, fixed: Mapping[str, Any], read: Mapping[str, Any], write: Mapping[str, Any]) -> Any:
        binding = self._step.io_binding()
        for name, value in (*fixed.items(), *read.items()):
            binding.bind_ortvalue_input(name, value)
        for name, value in write.items():
            binding.bind_ortvalue_output(_output_of(name), value)
        return binding

    def _upload(self, array: np.ndarray) -> Any:
        onnxruntime = onnxruntime_module()

        return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self._device, 0)
