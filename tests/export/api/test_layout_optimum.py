"""The optimum layout is loaded by optimum itself and generates what transformers generates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sbs_edge.errors import UsageError
from sbs_edge.export.api import export

SHAPES = {
    "tied": {},
    "untied, gated": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "deep encoder, odd width": {"num_layers": 3, "d_kv": 12},
    "one decoder layer": {"num_layers": 3, "num_decoder_layers": 1},
}


@pytest.mark.optimum
@pytest.mark.filterwarnings("ignore")  # optimum 2.1 and torch warn about their own use of each other
@pytest.mark.parametrize("shape", SHAPES)
def test_optimum_generates_the_same(make_student, tmp_path: Path, shape: str, rows) -> None:
    pytest.importorskip("optimum.onnxruntime", reason="needs the extra 'optimum' (transformers 4.57)")
    import torch
    from optimum.onnxruntime import ORTModelForSeq2SeqLM
    from transformers import AutoModelForSeq2SeqLM

    from sbs_edge.data.tokenizer import load_tokenizer

    student = make_student(tmp_path / "student", **SHAPES[shape])
    export(student, tmp_path / "optimum", targets=("cpu-fp32",), layout="optimum")
    model = ORTModelForSeq2SeqLM.from_pretrained(str(tmp_path / "optimum"), use_cache=True, use_merged=False)
    judge = AutoModelForSeq2SeqLM.from_pretrained(str(student)).eval()
    tokenizer = load_tokenizer(student)
    encoded = [tokenizer.encode("[rationale] " + row["input"]).ids for row in rows(6)]
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in encoded], batch_first=True)
    mask = (ids != 0).long()
    for beams in (1, 3):
        options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "num_beams": beams}
        assert model.generate(ids, **options).tolist() == judge.generate(ids, **options).tolist()
    # A whole target sequence in one pass, as scoring does it.
    target = torch.tensor([[0, 5, 6, 7, 8]] * len(ids))
    with torch.no_grad():
        expected = judge(input_ids=ids, attention_mask=mask, decoder_input_ids=target).logits.numpy()
    found = model(input_ids=ids, attention_mask=mask, decoder_input_ids=target).logits.numpy()
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_one_target_only(make_student, tmp_path: Path) -> None:
    student = make_student(tmp_path / "student")
    with pytest.raises(UsageError, match="single target"):
        export(student, tmp_path / "out", targets=("cpu-fp32", "cpu-int8"), layout="optimum", max_drop=100)
    assert not (tmp_path / "out").exists()
