"""A small random student and real bundles of it: written by the graph writer, judged by PyTorch.

Random weights are scaled up until answers differ between inputs; accuracy does not matter here.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

LABELS = ("stay", "go", "wait")
COLLIDING = ("red one", "red two", "blue")
PREFIXES = {"label": "[label] ", "rationale": "[rationale] "}
WORDS = [
    "the",
    "pump",
    "valve",
    "hot",
    "cold",
    "room",
    "fan",
    "filter",
    "ice",
    "door",
    "belt",
    "motor",
    "noise",
    "leak",
    "pipe",
    "north",
    "south",
    "day",
    "night",
]
MAX_SOURCE = 40


def texts_of(count: int, longest: int = 30, seed: int = 0) -> list[str]:
    """Texts of 1 to ``longest`` words."""
    import random

    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for _ in range(count)]


@dataclass(frozen=True)
class TinyStudent:
    """A T5 model with its tokenizer, on both sides of the export."""

    model: Any
    tokenizer: Any

    def ids(self, text: str, prefix: str = PREFIXES["label"]) -> list[int]:
        return list(self.tokenizer.encode(prefix + text).ids)

    def logits(self, text: str, prefix_tokens: list[int] | None = None) -> Any:
        """(T, V) decoder logits after the start token and ``prefix_tokens``."""
        import torch

        with torch.no_grad():
            return self.model(
                input_ids=torch.tensor([self.ids(text)]),
                decoder_input_ids=torch.tensor([[0, *(prefix_tokens or [])]]),
            ).logits[0]

    def generated(self, text: str, limit: int) -> list[int]:
        """Greedy tokens of the rationale, by transformers."""
        import torch

        out = self.model.generate(
            torch.tensor([self.ids(text, PREFIXES["rationale"])]), max_new_tokens=limit, do_sample=False
        )
        return out[0, 1:].tolist()


def make_tiny(seed: int = 0, **shape: Any) -> TinyStudent:
    """Build the model and a word tokenizer over the words above."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    from sbs_edge.data.tokenizer import build_tokenizer

    tokenizer = build_tokenizer([*WORDS, *LABELS, *COLLIDING, "because so"], list(PREFIXES.values()), "word")
    torch.manual_seed(seed)
    config = T5Config(
        **{
            "vocab_size": tokenizer.get_vocab_size(), "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4,
            "num_layers": 2, "num_decoder_layers": 2, "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 32, "dropout_rate": 0.0, "initializer_factor": 1.5,
            "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, **shape,
        }
    )  # fmt: skip
    return TinyStudent(T5ForConditionalGeneration(config).eval(), tokenizer)


def write_bundle(
    tiny: TinyStudent,
    out: Path,
    kind: str = "closed",
    labels: tuple[str, ...] = LABELS,
    long: dict[str, Any] | None = None,
) -> Path:
    """Write a bundle with the targets cpu-fp32 and cpu-int8 (all scales a row), without a guard."""
    from sbs_edge.export.graphs import states
    from sbs_edge.export.graphs.generate import build_rationale_generator
    from sbs_edge.export.graphs.label import build_label_classifier
    from sbs_edge.export.graphs.store import save_graphs
    from sbs_edge.export.graphs.trie import build_choice_classifier, build_trie_classifier
    from sbs_edge.export.graphs.weights import weights_of
    from sbs_edge.export.quant.precision import Float32, Int8
    from sbs_edge.runtime.bundle import seal

    weights = weights_of(tiny.model)
    tokens = [tiny.tokenizer.encode(label).ids for label in labels] if kind == "closed" else []
    method = {"open": "decode", "choices": "choices"}.get(kind) or (
        "first-token" if len({ids[0] for ids in tokens}) == len(tokens) else "trie"
    )
    out.mkdir(parents=True)
    targets = {}
    for target, precision in (("cpu-fp32", Float32()), ("cpu-int8", Int8({}))):
        models = {"explainer": build_rationale_generator(weights, precision)}
        if kind != "open":
            models["choice_scorer"] = build_choice_classifier(weights, precision)
        if method == "first-token":
            models["label_scorer"] = build_label_classifier(weights, precision, [ids[0] for ids in tokens])
        elif method == "trie":
            models["label_scorer"] = build_trie_classifier(weights, precision, tokens)
        if long is not None:
            models["long_encoder"] = states.build_state_encoder(weights, precision)
            models["long_explainer"] = states.build_state_rationale_generator(weights, precision)
            if kind != "open":
                models["long_choice_scorer"] = states.build_state_choice_classifier(weights, precision)
            if method == "first-token":
                firsts = [ids[0] for ids in tokens]
                models["long_label_scorer"] = states.build_state_label_classifier(weights, precision, firsts)
            elif method == "trie":
                models["long_label_scorer"] = states.build_state_trie_classifier(weights, precision, tokens)
        save_graphs(models, out / target)
        targets[target] = {name: f"{target}/{name}.onnx" for name in models} | {
            "providers": ["CPUExecutionProvider"], "accuracy": None,
        }  # fmt: skip
    tiny.tokenizer.save(str(out / "tokenizer.json"))
    seal(
        out,
        {
            "format": 1, "name": "tiny", "version": "1",
            "task": {"name": "tiny", "label_kind": kind, "labels": list(labels), "compare": "text"},
            "prefixes": PREFIXES,
            "limits": {"max_source_tokens": MAX_SOURCE, "max_new_tokens": 24, "max_label_tokens": 8},
            "labels": {
                "kind": kind, "method": method, "token_ids": [list(ids) for ids in tokens],
                "labels": list(labels) if kind == "closed" else [],
            },
            "calibration": {"temperature": 2.0, "abstain_below": 0.0, "n": 10},
            "targets": targets, "default_target": "cpu-fp32", "model": weights.describe(),
            **({} if long is None else {"long": long}),
        },
    )  # fmt: skip
    return out


@pytest.fixture(scope="session")
def tiny() -> TinyStudent:
    return make_tiny()


@pytest.fixture(scope="session")
def tiny_bundle(tiny: TinyStudent, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Closed labels, scored by their first tokens. Read only: copy it to damage it."""
    return write_bundle(tiny, tmp_path_factory.mktemp("bundles") / "closed")


@pytest.fixture(scope="session")
def trie_bundle(tiny: TinyStudent, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tiny, tmp_path_factory.mktemp("bundles") / "trie", labels=COLLIDING)


@pytest.fixture(scope="session")
def open_bundle(tiny: TinyStudent, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tiny, tmp_path_factory.mktemp("bundles") / "open", kind="open")


@pytest.fixture(scope="session")
def students() -> Any:
    """This module: what makes students of other shapes and their bundles."""
    import sys

    return sys.modules[__name__]


@pytest.fixture
def own_bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def some_texts() -> list[str]:
    return texts_of(40)
