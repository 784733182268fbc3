"""Ways to answer an input that is longer than a student reads in one piece.

``truncation`` reads the beginning. ``voting`` answers every chunk by itself and averages the probabilities. ``all states``
and ``top-k`` are the bundle's own reading in chunks. ``full attention`` reads the whole input in one piece with the same
weights, whatever memory that takes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

from sbs_edge.errors import UsageError
from sbs_edge.runtime.bundle import Bundle
from sbs_edge.runtime.student import Student
from sbs_edge.tokens import TextTokenizer, read_tokenizer
from sbs_edge.windows import ChunkReader, LongSettings

__all__ = ["WAYS", "Reader", "Way"]

Way = Literal["truncation", "voting", "all states", "top-k", "full attention"]
WAYS: tuple[Way, ...] = get_args(Way)


class Reader:
    """A bundle that answers long inputs in one of the ways.

    Example:
        >>> with Reader(Path("runs/latest/bundle"), "voting") as reader:
        ...     print(reader.label("log of oak | 06:00 elm the coil is frosted ."))
    """

    def __init__(
        self, root: Path, way: Way, target: str | None = None, *, top_k: int = 64, threads: int = 1
    ) -> None:
        """Load a target.

        Args:
            root: the bundle's directory.
            way: see the module's text.
            target: None: the bundle's default target.
            top_k: states each attention head reads in the way ``top-k``.
            threads: threads a call may use.

        Raises:
            UsageError: the bundle does not read long inputs, or has no closed label set.
        """
        bundle = Bundle.open(root)
        settings = LongSettings.of(bundle.manifest.get("long"))
        if settings is None or not bundle.manifest["labels"]["labels"]:
            raise UsageError(
                f"{root} must read long inputs and have a closed label set; export such a student with long=True."
            )
        options: dict[str, Any] = {
            "threads": threads,
            "truncate": way == "truncation",  # an input that another way cannot read whole is an error
            "long": way in ("all states", "top-k"),
        }
        if way == "top-k":
            options["top_k"] = top_k
        elif way == "all states":
            options["top_k"] = settings.max_tokens
        elif way == "full attention":
            limits = {**bundle.manifest["limits"], "max_source_tokens": settings.max_tokens}
            bundle = replace(bundle, manifest={**bundle.manifest, "limits": limits})
        self._student = Student(bundle, target, **options)
        self._chunks: ChunkReader | None = None
        if way == "voting":
            self._tokenizer = TextTokenizer(read_tokenizer(bundle.member("tokenizer.json")))
            self._prefix = bundle.manifest["prefixes"]["label"]
            eos = bundle.manifest["model"]["eos_token_id"]
            self._chunks = ChunkReader(self._tokenizer, replace(settings, marker=False), eos)

    def label(self, text: str) -> str:
        """Return the answer to ``text``."""
        if self._chunks is None:
            return self._student.predict(text).label
        chunks = self._chunks.chunks(text, self._tokenizer.encode(text, self._prefix), self._prefix)
        votes = self._student.predict(["a chunk"] * len(chunks), tokens=[chunk.ids for chunk in chunks])
        shares = {label: sum(vote.probabilities[label] for vote in votes) for label in self._student.labels}
        return max(shares, key=shares.__getitem__)

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._student.close()
