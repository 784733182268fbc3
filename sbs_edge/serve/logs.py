"""JSON logs on stderr, one object per line. They hold input texts only with ``log_inputs``."""

from __future__ import annotations

import logging
import sys
from typing import Any, TextIO

import structlog

__all__ = ["configure", "logger"]

level = "info"  # as last configured

logger: Any = structlog.get_logger("sbs_edge.serve")

_SHARED: list[Any] = [
    structlog.stdlib.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
]


def configure(threshold_name: str = "info", stream: TextIO | None = None, **fields: Any) -> None:
    """Send structlog and the standard library's loggers (uvicorn's among them) to ``stream`` as JSON.

    Args:
        threshold_name: debug, info, warning or error.
        stream: destination; stderr by default.
        fields: values added to every line.
    """
    global level
    level = threshold_name
    processors = [*_SHARED]
    if fields:
        processors.append(lambda _, __, event: {**fields, **event})
    stream = stream or sys.stderr
    threshold = logging.getLevelNamesMapping()[threshold_name.upper()]
    structlog.configure(
        processors=[
            *processors,
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(ensure_ascii=False),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.WriteLoggerFactory(stream),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=processors,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                structlog.processors.JSONRenderer(ensure_ascii=False),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(threshold, logging.WARNING))  # libraries log warnings and errors only
