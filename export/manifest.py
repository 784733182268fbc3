"""The manifest of a bundle, before its graphs are written."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

from sbs_edge import __version__
from sbs_edge.errors import UsageError
from sbs_edge.export.job import ExportJob
from sbs_edge.export.targets import Target
from sbs_edge.runtime.manifest import FORMAT
from sbs_edge.training.student_dir import StudentDir
from sbs_edge.versions import installed_versions

__all__ = ["new_manifest"]

_PACKAGES = ("onnx", "onnxruntime", "onnxruntime-gpu", "torch", "transformers", "tokenizers")


def new_manifest(job: ExportJob, wanted: Sequence[Target], name: str | None, version: str) -> dict[str, Any]:
    """Return the manifest without targets and figures; raise :class:`UsageError` for a version that is not a plain name."""
    opened, weights = job.opened, job.pruned.weights
    if not version or any(not (character.isalnum() or character in "._-") for character in version):
        raise UsageError(
            f"The version {version!r} must be made of letters, digits, dots, dashes and underscores."
        )
    return {
        "format": FORMAT,
        "name": name or opened.task.name,
        "version": version,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "task": StudentDir.task_card(opened.task),
        "prefixes": dict(opened.prefixes),
        "limits": {
            "max_source_tokens": opened.limits["max_source_tokens"],
            "max_new_tokens": opened.limits["max_target_tokens"],
            "max_label_tokens": opened.limits["max_label_tokens"],
        },
        "labels": job.pruned.plan.describe(),
        "calibration": {"temperature": 1.0, "n": 0, "abstain_below": job.limits.abstain_below},
        "targets": {},
        "default_target": wanted[0].name,
        "model": weights.describe(),
        "vocabulary": job.small.figures if job.small else None,
        "files": {},
        "versions": {"sbs-edge": __version__, **installed_versions(*_PACKAGES)},
        **({} if job.long is None else {"long": job.long.describe()}),
        "seed": opened.card.get("seed"),
        "training": {
            "mode": opened.mode,
            "rationale_weight": opened.card.get("rationale_weight"),
            "metrics": opened.card.get("training"),
        },
    }
