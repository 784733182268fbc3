"""``POST /v1/predict``: the JSON route. Its pydantic models are also its OpenAPI schema."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sbs_edge.serve import errors
from sbs_edge.serve.body import parse_json
from sbs_edge.serve.inference_request import InferenceRequest, check_labels

__all__ = ["ErrorBody", "PredictRequest", "PredictResponse", "parse_predict"]


class PredictRequest(BaseModel):
    """Texts to answer."""

    model_config = ConfigDict(extra="forbid", strict=True)

    texts: list[str] = Field(description="The texts to answer.", min_length=1)
    labels: list[list[str]] | list[str] | None = Field(
        default=None,
        description="Tasks with choices: the answers to choose from, as one list for all texts or one list for each.",
    )
    explain: bool = Field(default=False, description="Also generate the rationale of each answer.")
    model: str | None = Field(
        default=None, description="Name of the model; may be left out when one is served."
    )
    version: str | None = Field(default=None, description="Version; the newest when left out.")
    truncate: bool | None = Field(
        default=None, description="Cut texts over the token limit instead of refusing them."
    )
    max_new_tokens: int | None = Field(default=None, ge=1, description="Longest rationale in tokens.")


class StudentAnswer(BaseModel):
    """The student's own answer to a text that was escalated."""

    label: str
    probability: float
    probabilities: dict[str, float]


class Prediction(BaseModel):
    """The answer to a text."""

    label: str
    probability: float | None = Field(
        description="Of the student's label; null if escalated, because the larger model gives none."
    )
    probabilities: dict[str, float] = Field(description="Of the student's labels; empty if escalated.")
    abstained: bool = Field(description="The probability is below the model's threshold.")
    escalated: bool = Field(description="The label is the larger model's.")
    truncated: bool
    rationale: str | None = Field(default=None, description="Always the student's, also if escalated.")
    rationale_complete: bool | None = None
    student: StudentAnswer | None = Field(
        default=None, description="Only if escalated: the student's own label and probabilities."
    )


class PredictResponse(BaseModel):
    """Answers in the order of the texts."""

    model: str
    version: str
    predictions: list[Prediction]


class ErrorBody(BaseModel):
    """The body of every error response."""

    error: str


def parse_predict(body: bytes) -> InferenceRequest:
    """Parse and check the body; an invalid one is a 400 that names the field."""
    try:
        request = PredictRequest.model_validate(parse_json(body))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the body"
        raise errors.bad_request(f"{where}: {first['msg']}.") from error
    labels: list[list[str]] | None = None
    if request.labels is not None:
        rows: list[Any] = list(request.labels)
        if all(isinstance(row, str) for row in rows):  # one list for all texts is checked once
            check_labels([rows], 1)
            labels = [rows] * len(request.texts)
        else:
            check_labels(rows, len(request.texts))
            labels = rows
    return InferenceRequest(
        texts=request.texts,
        labels=labels,
        explain=request.explain,
        truncate=request.truncate,
        max_new_tokens=request.max_new_tokens,
        model=request.model,
        version=request.version,
    )
