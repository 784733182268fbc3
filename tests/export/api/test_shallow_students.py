"""A student cut from a deeper checkpoint is exported like any other: every role answers as PyTorch does."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sbs_edge.export.api import export
from sbs_edge.runtime.student import Student
from sbs_edge.training.checkpoint import open_checkpoint
from sbs_edge.training.model import cache_options
from sbs_edge.training.pretrained import load_opened, save_model
from sbs_edge.training.student_dir import StudentDir

# Labels that begin alike are scored by a trie, others in one step.
ONE_STEP, TRIE = ("stay", "go", "wait"), ("wait", "wait red", "go")


def shallow(whole: Path, out: Path, encoder: str, decoder: str) -> Path:
    """Write the student ``whole`` with some of its layers."""
    save_model(load_opened(open_checkpoint(str(whole)), None, encoder, decoder), out)
    for path in whole.iterdir():
        if not (out / path.name).exists():
            shutil.copyfile(path, out / path.name)
    return out


@pytest.mark.parametrize("labels", [ONE_STEP, TRIE], ids=["one step", "trie"])
@pytest.mark.parametrize(
    ("encoder", "decoder", "counts"),
    [("1,3", "2,", (2, 1)), ("1", "1,2", (1, 2)), ("3", "1", (3, 1))],
    ids=["without layer 0", "deeper decoder", "one decoder layer"],
)
def test_every_role_answers_as_pytorch_does(
    make_student: Any, tmp_path: Path, rows: Any, encoder: str, decoder: str, counts: tuple[int, int],
    labels: tuple[str, ...],
) -> None:  # fmt: skip
    whole = make_student(tmp_path / "whole", labels=ONE_STEP, num_layers=4, num_decoder_layers=3)
    student = shallow(whole, tmp_path / "student", encoder, decoder)
    card = student / "sbs_edge.json"
    card.write_text(card.read_text().replace('["stay", "go", "wait"]', str(list(labels)).replace("'", '"')))
    for name in ("validation.jsonl", "calibration.jsonl"):
        text = (student / name).read_text()
        (student / name).write_text(text if labels == ONE_STEP else text.replace('"stay"', '"wait red"'))
    found = export(
        student, tmp_path / "bundle", targets=("cpu-fp32", "cpu-int8"), beams=(2,), max_drop=100.0,
        min_rationale_agreement=0.0,
    )  # fmt: skip
    model = found.manifest["model"]
    assert (model["n_encoder_layers"], model["n_decoder_layers"]) == counts
    assert found.manifest["labels"]["method"] == ("first-token" if labels == ONE_STEP else "trie")

    opened, judge = StudentDir.load(student), StudentDir.load(student).load_model()
    tokenizer, texts = opened.text_tokenizer(), [row["input"] for row in rows(5)]
    with Student.load(tmp_path / "bundle", "cpu-fp32") as ours:
        written = [answer.rationale for answer in ours.explain(texts, max_new_tokens=8)]
        beams = [answer.rationale for answer in ours.explain(texts, max_new_tokens=8, num_beams=2)]
        chances = ours.predict_proba(texts)
    temperature = found.manifest["calibration"]["temperature"]
    for text, greedy, beam, row in zip(texts, written, beams, chances, strict=True):
        ids = torch.tensor([tokenizer.encode(text, opened.prefixes["rationale"])])
        for width, got in ((1, greedy), (2, beam)):
            more = cache_options(judge) if width == 1 else {"use_cache": False}
            out = judge.generate(ids, max_new_tokens=8, do_sample=False, num_beams=width, **more)[
                0, 1:
            ].tolist()
            assert got == tokenizer.decode(out[: out.index(1)] if 1 in out else out)
        ids = torch.tensor([tokenizer.encode(text, opened.prefixes["label"])])
        scores = []
        for label in labels:
            target = tokenizer.encode_target(label, 1)
            with torch.no_grad():
                logits = judge(
                    input_ids=ids, decoder_input_ids=torch.tensor([[0, *target[:-1]]]), use_cache=False
                ).logits[0]
            if labels == ONE_STEP:
                scores.append(logits[0, target[0]].item())
            else:
                log_p = logits.log_softmax(-1)
                scores.append(sum(log_p[step, token].item() for step, token in enumerate(target)))
        wanted = (torch.tensor(scores) / temperature).softmax(0).tolist()
        assert row.tolist() == pytest.approx(wanted, abs=1e-4)
