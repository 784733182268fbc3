"""From settings to a teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sbs_edge.errors import UsageError
from sbs_edge.teacher.calls import Teacher

if TYPE_CHECKING:
    from sbs_edge.teacher.annotate import Settings

__all__ = ["connect"]


def connect(
    settings: Settings,
    *,
    backend: str = "openai",
    base_url: str | None = None,
    api_key_env: str = "OPENAI_API_KEY",
    timeout: float = 120.0,
    device: str | None = None,
) -> Teacher:
    """Return the teacher that ``backend`` names: ``openai`` (HTTP) or ``local`` (transformers)."""
    if backend == "openai":
        from sbs_edge.teacher.openai_api import OpenAITeacher

        return OpenAITeacher(
            settings.model,
            base_url,
            api_key_env=api_key_env,
            timeout_seconds=timeout,
            max_connections=settings.concurrency,
        )
    if backend == "local":
        from sbs_edge.teacher.local_model import LocalTeacher

        return LocalTeacher(settings.model, device=device, max_batch=settings.concurrency)
    raise UsageError(f"There is no teacher backend {backend!r}; there are openai and local.")
