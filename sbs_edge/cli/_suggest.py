"""Suggest options, fields and commands: by their names in other programs, then by similar spelling."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["suggested"]

# Names that other programs use, with ours in order of preference.
_ALIASES: dict[str, tuple[str, ...]] = {
    "accumulation-steps": ("gradient-accumulation",),
    "batch": ("batch-size", "batches"),
    "benchmark": ("bench",),
    "bs": ("batch-size",),
    "checkpoint": ("model",),
    "convert": ("export",),
    "cpu": ("device", "target"),
    "device": ("target",),
    "epoch": ("epochs", "max-steps", "steps"),
    "epochs": ("max-steps", "steps"),
    "eval": ("evaluate",),
    "fit": ("train",),
    "generate": ("predict",),
    "gpu": ("device", "target"),
    "hidden-size": ("d-model",),
    "infer": ("predict",),
    "inference": ("predict",),
    "key": ("api-key-env",),
    "api-key": ("api-key-env",),
    "lambda": ("rationale-weight",),
    "log-every": ("eval-steps",),
    "lr": ("learning-rate",),
    "lr-scheduler-type": ("schedule",),
    "max-grad-norm": ("clip-norm",),
    "max-length": ("max-source-tokens", "max-tokens"),
    "max-new-tokens": ("max-tokens", "max-target-tokens"),
    "max-steps": ("steps",),
    "model-name-or-path": ("model",),
    "num-epochs": ("epochs", "max-steps", "steps"),
    "num-layers": ("n-layers",),
    "num-threads": ("threads",),
    "num-train-epochs": ("epochs", "max-steps", "steps"),
    "num-workers": ("workers",),
    "o": ("out",),
    "output-dir": ("out",),
    "patience": ("early-stopping-patience",),
    "per-device-train-batch-size": ("batch-size",),
    "quantize": ("export",),
    "rank": ("lora-rank",),
    "save-dir": ("out",),
    "scheduler": ("schedule",),
    "server": ("serve",),
    "step": ("steps", "max-steps"),
    "steps": ("max-steps",),
    "test-data": ("test", "data"),
    "train-data": ("data",),
    "val": ("validation",),
    "warmup-steps": ("warmup",),
    "wd": ("weight-decay",),
}


def suggested(name: str, known: Iterable[str]) -> list[str]:
    """Return at most three of the ``known`` names that ``name`` may mean, the likeliest first.

    Dashes, underscores and leading dashes do not count.

    Example:
        >>> suggested("lr", ["learning_rate", "seed"])
        ['learning_rate']

    """
    by_key = {_key(each): each for each in known}
    wanted = _key(name)
    aliases = [by_key[alias] for alias in _ALIASES.get(wanted, ()) if alias in by_key]
    if aliases:
        return aliases[:1]
    longer = [each for key, each in by_key.items() if len(wanted) > 2 and wanted in key.split("-")]
    close = [by_key[key] for key in get_close_matches(wanted, by_key, n=3, cutoff=0.7)]
    return list(dict.fromkeys([*close, *longer]))[:3]


def _key(name: str) -> str:
    return name.lstrip("-").replace("_", "-").lower()
