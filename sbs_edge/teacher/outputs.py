"""Read finished outputs from files, and write OpenAI Batch files.

Two layouts are read: OpenAI Batch output (JSON Lines; ``custom_id`` is the journal key) and the
paper's (JSON arrays with one string per row, in row order, split over ``<split>_CoT_<k>.json``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sbs_edge import files
from sbs_edge.chat.endpoint import one_line
from sbs_edge.chat.protocol import content_text, failure, read_answer, token_count
from sbs_edge.errors import DataError, UsageError
from sbs_edge.teacher.ask import no_answer
from sbs_edge.teacher.calls import CallFailed, Sampling, request_body
from sbs_edge.teacher.cost import Prices
from sbs_edge.teacher.journal import Record
from sbs_edge.teacher.prompt import Call

__all__ = ["batch_request", "emit_batch", "read_batch_outputs", "read_paper_outputs"]

# The published limits of one Batch input file.
MAX_BATCH_REQUESTS = 50_000
MAX_BATCH_BYTES = 200 * 1000 * 1000


def batch_request(call: Call, model: str, sampling: Sampling) -> dict[str, Any]:
    """Return one line of a Batch input file."""
    route, body = request_body(call.prompt, model, sampling, call.sample)
    return {"custom_id": call.key, "method": "POST", "url": f"/v1{route}", "body": body}


def emit_batch(
    calls: Iterable[Call],
    model: str,
    sampling: Sampling,
    path: Path,
    *,
    max_requests: int = MAX_BATCH_REQUESTS,
    max_bytes: int = MAX_BATCH_BYTES,
) -> list[Path]:
    """Write Batch input files, each within the service's limits; return their paths.

    One file keeps the name ``path``; more are numbered before the suffix.
    """
    shards: list[list[bytes]] = [[]]
    size = 0
    for call in calls:
        line = json.dumps(batch_request(call, model, sampling), ensure_ascii=False).encode("utf-8") + b"\n"
        if shards[-1] and (len(shards[-1]) >= max_requests or size + len(line) > max_bytes):
            shards.append([])
            size = 0
        shards[-1].append(line)
        size += len(line)
    paths = []
    for number, shard in enumerate(shards):
        name = path if len(shards) == 1 else path.with_name(f"{path.stem}-{number:03d}{path.suffix}")
        files.write_bytes(name, b"".join(shard))
        paths.append(name)
    return paths


def _batch_line(content: Any, where: str, prices: Prices) -> Record:
    """Read a line; a response that cannot be used affects only its own row."""
    if not isinstance(content, dict) or not isinstance(content.get("custom_id"), str):
        raise DataError(f"{where}: no custom_id; is this a Batch output file?")
    key = content["custom_id"]
    if error := content.get("error"):
        found = error if isinstance(error, dict) else {"message": error}
        reason = one_line(str(found.get("code") or "failed"), 40)
        return Record(key, "", error=f"{reason}: {one_line(str(found.get('message') or 'in the batch'))}")
    response = content.get("response")
    if not isinstance(response, dict):
        return Record(key, "", error="not-the-protocol: the line holds neither response nor error")
    status, body = token_count(response.get("status_code")), response.get("body")
    try:
        if status is not None and status != 200:
            failed = failure(status, body)
            reason = "refused" if failed.reason == "refused" else f"http-{status}"
            return Record(key, "", error=f"{reason}: {one_line(failed.detail)}")
        answer = read_answer(body)
    except CallFailed as failed:
        return Record(key, "", error=one_line(str(failed)))
    asked, written = answer.prompt_tokens or 0, answer.completion_tokens or 0
    return Record(
        key,
        answer.text,
        answer.finish_reason,
        error=no_answer(answer),
        prompt_tokens=asked,
        completion_tokens=written,
        cost=prices.cost(asked, written),
        model=answer.model or "",
        reasoning=answer.reasoning,
        top_logprobs=answer.top_logprobs,
    )


def read_batch_outputs(paths: Iterable[Path], prices: Prices) -> dict[str, Record]:
    """Read Batch output and error files into records by key; a later line wins."""
    records: dict[str, Record] = {}
    for path in paths:
        for where, line in _json_lines(path):
            try:
                content = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not valid JSON ({error}).") from error
            record = _batch_line(content, where, prices)
            records[record.key] = record
    return records


def _json_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with path.open("rb") as handle:
            for number, line in enumerate(handle, 1):
                if line.strip():
                    yield f"{path}, line {number}", line
    except OSError as error:
        raise UsageError(f"The outputs {path} cannot be read: {error.strerror}.") from error


def _number(path: Path) -> int:
    found = re.search(r"_(\d+)$", path.stem)
    return int(found[1]) if found else 0


def read_paper_outputs(paths: Iterable[Path]) -> list[Record]:
    """Read JSON arrays with one string per row, in the order of the numbers at the end of their names."""
    records: list[Record] = []
    for path in sorted(paths, key=_number):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"The outputs {path} cannot be read: {error.strerror}.") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not valid JSON ({error}).") from error
        if not isinstance(content, list):
            raise DataError(f"{path}: must hold a JSON array of strings, one for each row.")
        for index, item in enumerate(content):
            try:
                records.append(Record(f"{path.name}[{index}]", content_text(item)))
            except ValueError as error:
                raise DataError(
                    f"{path}, entry {index + 1}: not a text ({error}). The file must hold a JSON array of strings, "
                    "one for each row."
                ) from error
    return records
