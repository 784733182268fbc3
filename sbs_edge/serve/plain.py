"""``POST /v1/predict``: the route for people. The models here are also its OpenAPI schema."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sbs_edge.serve import errors
from sbs_edge.serve.body import parse_json
from sbs_edge.serve.inference_request import Answer, InferenceRequest, check_labels

__all__ = ["ErrorBody", "PredictRequest", "PredictResponse", "encode_answers", "parse_predict"]


class PredictRequest(BaseModel):
    """Texts to answer."""

    model_config = ConfigDict(extra="forbid", strict=True)

    texts: list[str] = Field(description="The texts to answer.", min_length=1)
    labels: list[list[str]] | list[str] | None = Field(
        default=None,
        description="Tasks with choices: the answers to choose from, one list for all texts or one for each.",
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
    """The student's own answer, where a larger model's label took its place."""

    label: str
    probability: float
    probabilities: dict[str, float]


class Prediction(BaseModel):
    """One answer."""

    label: str
    probability: float | None = Field(
        description="The student's; null if escalated: the larger model gives none."
    )
    probabilities: dict[str, float] = Field(description="The student's; empty if escalated.")
    abstained: bool = Field(description="The probability is below the model's threshold.")
    escalated: bool = Field(description="The label came from the larger model the server escalates to.")
    truncated: bool
    rationale: str | None = Field(default=None, description="The student's, also if escalated.")
    rationale_complete: bool | None = None
    student: StudentAnswer | None = Field(
        default=None, description="Only if escalated: the student's own label and figures."
    )


class PredictResponse(BaseModel):
    """Answers in the order of the texts."""

    model: str
    version: str
    predictions: list[Prediction]


class ErrorBody(BaseModel):
    """Every answer other than 200."""

    error: str


def parse_predict(body: bytes) -> tuple[PredictRequest, InferenceRequest]:
    """Parse and check the body; any defect is a 400 that names the field."""
    try:
        request = PredictRequest.model_validate(parse_json(body))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the body"
        raise errors.bad_request(f"{where}: {first['msg']}.") from error
    labels: list[list[str]] | None = None
    if request.labels is not None:
        rows: list[Any] = list(request.labels)
        if all(isinstance(row, str) for row in rows):  # one list for all texts is looked at once
            check_labels([rows], 1)
            labels = [rows] * len(request.texts)
        else:
            check_labels(rows, len(request.texts))
            labels = rows
    asking = InferenceRequest(
        texts=request.texts,
        labels=labels,
        explain=request.explain,
        truncate=request.truncate,
        max_new_tokens=request.max_new_tokens,
    )
    return request, asking


def encode_answers(model: str, version: str, answers: list[Answer]) -> dict[str, Any]:
    """Return the JSON document of a 200 answer."""
    predictions = []
    for answer in answers:
        entry: dict[str, Any] = {
            "label": answer.label,
            "probability": answer.probability,
            "probabilities": dict(answer.probabilities),
            "abstained": answer.abstained,
            "escalated": answer.escalated,
            "truncated": answer.truncated,
        }
        if answer.student is not None:
            entry["student"] = dict(answer.student)
        if answer.rationale is not None:
            entry["rationale"] = answer.rationale
            entry["rationale_complete"] = answer.rationale_complete
        predictions.append(entry)
    return {"model": model, "version": version, "predictions": predictions}
