"""Eager PyTorch through transformers: what a student costs before anything is exported."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbs_edge.bench.peers.system import System

if TYPE_CHECKING:
    import numpy as np

__all__ = ["PACKAGES", "ROOTS", "SYSTEM", "prepare"]

ROOTS: dict[str, tuple[str, ...]] = {"torch": (), "transformers": (), "safetensors": ()}
PACKAGES = ("torch", "transformers")


def prepare(student: Path, out: Path) -> dict[str, Any]:
    """Nothing to convert: the student directory itself is loaded."""
    del student, out
    return {"in_place": True, "files": ["model.safetensors", "config.json", "tokenizer.json"]}


class Transformers(System):
    """``T5ForConditionalGeneration.generate`` with its defaults (fp32, cache, greedy)."""

    deep_decoder = False  # deeper than the encoder

    def open(self) -> None:
        """Load the fp32 checkpoint."""
        import torch
        from transformers import AutoModelForSeq2SeqLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        torch.set_num_threads(self.spec.threads)
        torch.set_num_interop_threads(1)
        self.torch = torch
        self.model = AutoModelForSeq2SeqLM.from_pretrained(self.spec.student, local_files_only=True).eval()
        config = self.model.config
        self.deep_decoder = config.num_decoder_layers > config.num_layers

    def generate(self, ids: list[list[int]], steps: int) -> list[list[int]]:
        """Greedy ``generate``."""
        tokens, mask = (self.torch.from_numpy(array) for array in self.padded(ids))
        more: dict[str, Any] = {}
        if self.deep_decoder:  # the import is for these only: a cold start is measured
            from sbs_edge.training.model import cache_options

            more = cache_options(self.model)
        with self.torch.inference_mode():
            found = self.model.generate(
                input_ids=tokens,
                attention_mask=mask,
                max_new_tokens=steps,
                do_sample=False,
                num_beams=1,
                **more,
            )
        return [self.cut(row) for row in found[:, 1:].tolist()]

    def first_logits(self, ids: list[list[int]]) -> np.ndarray:
        """One forward pass with the start token."""
        tokens, mask = (self.torch.from_numpy(array) for array in self.padded(ids))
        start = self.torch.full((len(ids), 1), self.spec.start, dtype=self.torch.long)
        with self.torch.inference_mode():
            logits = self.model(input_ids=tokens, attention_mask=mask, decoder_input_ids=start).logits
        found: np.ndarray = logits[:, -1].float().numpy()
        return found


SYSTEM = Transformers
