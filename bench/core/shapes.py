"""Students of a named shape with random weights: latency, size and memory do not depend on training.

Other figures depend on it, and the student is built so that they keep a meaning. The gold label of every
validation row is the answer of the fp32 weights, so "accuracy" means agreement with fp32. The three
label words are chosen so that the answers are spread and decided by a margin. The head's rows of the
special tokens are made small, so that a rationale of 64 tokens has 64 tokens in every system. Like a task,
a shape uses only a part of its vocabulary: rows are drawn from :data:`WORDS_IN_USE` words, and the head's
rows of all others are made small too, so that pruning to the words in use does not change an answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sbs_edge import __version__, files
from sbs_edge.bench.peers.convert import cache_root, digest
from sbs_edge.errors import MissingExtra, UsageError

__all__ = [
    "SHAPES",
    "check_shape",
    "layers_of",
    "random_model",
    "random_student",
    "shape_bundle",
    "shape_student",
]

_COMMON: dict[str, Any] = {"vocab_size": 32128, "d_kv": 64}
SHAPES: dict[str, dict[str, Any]] = {
    "t5-small": {**_COMMON, "d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
    "t5-v1_1-small": {
        **_COMMON,
        "d_model": 512,
        "d_ff": 1024,
        "num_layers": 8,
        "num_heads": 6,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    },
    "flan-t5-base": {
        **_COMMON,
        "d_model": 768,
        "d_ff": 2048,
        "num_layers": 12,
        "num_heads": 12,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
    },
    # For smoke tests, which take seconds.
    "tiny": {"vocab_size": 512, "d_kv": 16, "d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 4},
}
PREFIXES = {"label": "[label] ", "rationale": "[rationale] "}
MAX_SOURCE_TOKENS = 512
MAX_TARGET_TOKENS = 64
Say = Callable[[str], None]
_SHRINK = 0.01
WORDS_IN_USE = 4000
_SPECIAL = ("<pad>", "</s>", "<unk>", "[label]", "[rationale]")


def _tokenizer(vocab_size: int) -> Any:
    """Return a word-level tokenizer with exactly ``vocab_size`` words, so that token counts are word counts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {word: index for index, word in enumerate(_SPECIAL)}
    words.update({f"w{index}": index for index in range(len(_SPECIAL), vocab_size)})
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def _words(vocab_size: int, seed: int) -> Any:
    """The ids (W,) of the words that rows are drawn from, sorted: at most half of the vocabulary."""
    import numpy as np

    n_words = min(WORDS_IN_USE, vocab_size // 2)
    allowed = np.arange(len(_SPECIAL), vocab_size)
    return np.sort(np.random.default_rng(seed).choice(allowed, size=n_words, replace=False))


def _rows(n: int, words: Any, seed: int) -> list[str]:
    """Return random inputs of 8 to 48 words."""
    import numpy as np

    rng = np.random.default_rng(seed)
    return [" ".join(f"w{index}" for index in rng.choice(words, rng.integers(8, 49))) for _ in range(n)]


def _first_logits(model: Any, tokenizer: Any, texts: list[str]) -> Any:
    """fp32 logits (N, V) of the first target token of the label task."""
    import torch

    found = []
    with torch.inference_mode():
        for text in texts:
            ids = torch.tensor([tokenizer.encode(PREFIXES["label"] + text).ids])
            start = torch.zeros(1, 1, dtype=torch.long)
            found.append(model(input_ids=ids, decoder_input_ids=start).logits[0, -1])
    return torch.stack(found).float().numpy()


def _label_tokens(logits: Any, seed: int, k: int = 3) -> list[int]:
    """Pick ``k`` tokens whose best score is spread over the rows and has the widest margin."""
    import numpy as np

    rng = np.random.default_rng(seed)
    # Tokens of similar mean and large spread: groups of neighbours by mean logit, then at random.
    centre, spread = logits.mean(axis=0), logits.std(axis=0)
    allowed = np.arange(len(_SPECIAL), logits.shape[1])
    lively = allowed[np.argsort(-spread[allowed])[: max(64, len(allowed) // 8)]]
    lively = lively[np.argsort(centre[lively])]
    best: tuple[float, list[int]] = (-1.0, [int(token) for token in lively[:k]])
    for _ in range(4000):
        at = int(rng.integers(0, len(lively) - k))
        group = rng.choice(lively[max(0, at - 8) : at + 8 + k], size=k, replace=False)
        scores = logits[:, group]
        share = np.bincount(scores.argmax(axis=1), minlength=k) / len(scores)
        ordered = np.sort(scores, axis=1)
        worth = float(min(share.min(), 0.2) * np.quantile(ordered[:, -1] - ordered[:, -2], 0.2))
        if worth > best[0]:
            best = (worth, [int(token) for token in group])
    return sorted(best[1])


def layers_of(shape: str, encoder: int | None = None, decoder: int | None = None) -> tuple[int, int]:
    """Return the encoder's and the decoder's layers: as given, or the shape's own."""
    own = int(SHAPES[shape]["num_layers"])
    return own if encoder is None else encoder, own if decoder is None else decoder


def check_shape(shape: str) -> None:
    """Raise :class:`UsageError` for a shape that does not exist."""
    if shape not in SHAPES:
        raise UsageError(f"There is no shape {shape!r}; choose one of {', '.join(SHAPES)}.")


def _torch_and_transformers() -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise MissingExtra(error.name or "transformers", "bench", "A random student") from error
    return torch, transformers


def random_model(shape: str, seed: int, **changes: Any) -> Any:
    """Return a T5 of ``shape`` with random weights; ``changes`` replace fields of its configuration.

    Raises:
        MissingExtra: torch or transformers is not installed.
    """
    torch, transformers = _torch_and_transformers()
    torch.manual_seed(seed)
    fields = {"tie_word_embeddings": True, "feed_forward_proj": "relu", **SHAPES[shape], **changes}
    config = transformers.T5Config(**fields, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    return transformers.T5ForConditionalGeneration(config)


def random_student(
    shape: str,
    destination: Path,
    *,
    seed: int = 0,
    n_validation: int = 128,
    encoder_layers: int | None = None,
    decoder_layers: int | None = None,
) -> Path:
    """Write a student directory of ``shape`` with random weights and return it.

    Args:
        shape: a key of :data:`SHAPES`.
        destination: the directory to create (replaced as a whole).
        seed: seeds the weights and the rows.
        n_validation: validation rows; as many calibration rows are written.
        encoder_layers: layers in place of the shape's own.
        decoder_layers: the same of the decoder.

    Raises:
        UsageError: the shape is unknown.
        MissingExtra: torch or transformers is not installed.
    """
    check_shape(shape)
    encoder, decoder = layers_of(shape, encoder_layers, decoder_layers)
    model = random_model(shape, seed, num_layers=encoder, num_decoder_layers=decoder).eval()
    import torch
    from transformers import PreTrainedTokenizerFast

    config = model.config
    words = _words(config.vocab_size, seed)
    unused = torch.ones(config.vocab_size, dtype=torch.bool)
    unused[torch.from_numpy(words)] = False
    with torch.no_grad():
        # Padding (the start token, which a tied head would repeat), EOS and unknown among them.
        model.get_output_embeddings().weight[unused] *= _SHRINK
    tokenizer = _tokenizer(config.vocab_size)
    validation = _rows(n_validation, words, seed + 1)
    calibration = _rows(n_validation, words, seed + 2)
    logits = _first_logits(model, tokenizer, validation)
    tokens = _label_tokens(logits, seed)
    labels = [f"w{token}" for token in tokens]
    gold = [labels[index] for index in logits[:, tokens].argmax(axis=1)]
    task = {"name": f"random-{shape}", "label_kind": "closed", "labels": labels, "compare": "text"}
    card = {
        "format": 1,
        "task": task,
        "prefixes": PREFIXES,
        "mode": "stepwise",
        "rationale_weight": 1.0,
        "max_source_tokens": MAX_SOURCE_TOKENS,
        "max_target_tokens": MAX_TARGET_TOKENS,
        "max_label_tokens": 2,
        "seed": seed,
        "versions": {"sbs_edge": __version__, "torch": torch.__version__},
        "training": {"random_weights": True, "shape": shape},
    }
    with files.atomic_directory(destination) as work:
        model.save_pretrained(work)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        ).save_pretrained(work)
        files.write_json(work / "sbs_edge.json", card)
        _write_rows(work / "validation.jsonl", "v", validation, gold)
        spare = [labels[index % len(labels)] for index in range(len(calibration))]
        _write_rows(work / "calibration.jsonl", "c", calibration, spare)
    return destination


def shape_student(
    shape: str, seed: int, say: Say, encoder_layers: int | None = None, decoder_layers: int | None = None
) -> Path:
    """Return the cached random student of a shape, with other numbers of layers if given, made on first use."""
    check_shape(shape)
    version = _torch_and_transformers()[1].__version__.split(".")[0]
    layers = layers_of(shape, encoder_layers, decoder_layers)
    depth = "" if layers == layers_of(shape) else f"-{layers[0]}-{layers[1]}"
    target = cache_root() / f"student-{shape}{depth}-{seed}-v3-transformers{version}"
    if not (target / "sbs_edge.json").is_file():
        say(f"making a random student of shape {shape}, {layers[0]}/{layers[1]} layers")
        random_student(shape, target, seed=seed, encoder_layers=layers[0], decoder_layers=layers[1])
    return target


def shape_bundle(student: Path, targets: Sequence[str], say: Say, **options: Any) -> Path:
    """Return the cached bundle of a random student, exported without the accuracy check.

    Args:
        student: the student directory.
        targets: what to export it for.
        say: receives a line when it is made.
        options: switches of the export.
    """
    import sbs_edge.export.api as export_package
    from sbs_edge.export.api import export

    writer = Path(export_package.__file__).parent
    code = digest(writer, tuple(sorted(path.name for path in writer.glob("*.py"))))
    name = f"bundle-{digest(student)[:12]}-{'-'.join(targets)}-{__version__}-{code[:8]}"
    name = "-".join([name, *(option for option, on in options.items() if on)])
    target = cache_root() / name
    if not (target / "manifest.json").is_file():
        say(f"exporting {student.name} for {', '.join(targets)}")
        # Rationales of random weights depend on rounding; the accuracy is shown with every speed instead.
        export(
            student, target, targets=tuple(targets), max_drop=100.0, min_rationale_agreement=0.0, **options
        )
    return target


def _write_rows(path: Path, name: str, texts: list[str], labels: list[str]) -> None:
    lines = [
        json.dumps({"id": f"{name}{index}", "input": text, "label": label, "rationale": text})
        for index, (text, label) in enumerate(zip(texts, labels, strict=True))
    ]
    files.write_text(path, "\n".join(lines) + "\n")
