"""Text in, label out, from one file, with the same tokens as the bundle's tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sbs_edge.errors import UsageError
from sbs_edge.export.api import export
from sbs_edge.runtime.student import Student

pytestmark = pytest.mark.filterwarnings("ignore")


def test_text_in_label_out(make_student, tmp_path: Path, rows) -> None:
    extensions = pytest.importorskip("onnxruntime_extensions", reason="needs the extra 'single-file'")
    import onnxruntime

    from sbs_edge.data.tokenizer import build_tokenizer

    student = make_student(tmp_path / "student", vocab_size=256)
    texts = [row["input"] for row in rows(40)]
    unigram = build_tokenizer(
        [*texts, "stay", "go", "wait", "the room so"] * 20, ["[label]", "[rationale]"], "unigram", 200
    )
    unigram.save(str(student / "tokenizer.json"))
    export(student, tmp_path / "b", targets=("cpu-fp32",), single_file=True, max_drop=100)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(extensions.get_library_path())
    session = onnxruntime.InferenceSession(str(tmp_path / "b/cpu-fp32/single_file.onnx"), options)
    with Student.load(tmp_path / "b", threads=1) as loaded:
        typed = [f"{texts[0]} {mark} {texts[1]}" for mark in ("</s>", "<pad>", "[rationale]", "[label]")]
        for text in [*texts, *typed]:
            label, probabilities = session.run(None, {"text": np.array([text], dtype=object)})
            (expected,) = loaded.predict([text], truncate=True)
            scores = loaded.label_scores([text], truncate=True)[0]
            assert label[0] == expected.label
            assert np.allclose(
                probabilities[0],
                np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum(),
                atol=1e-4,
            )


def test_what_cannot_be_one_file_is_refused(make_student, tmp_path: Path) -> None:
    words = make_student(tmp_path / "words")
    with pytest.raises(UsageError, match="'WordLevel'"):
        export(words, tmp_path / "b", targets=("cpu-fp32",), single_file=True)
    decoded = make_student(tmp_path / "open", kind="open", labels=())
    with pytest.raises(UsageError, match="closed"):
        export(decoded, tmp_path / "b", targets=("cpu-fp32",), single_file=True)
    assert not (tmp_path / "b").exists()
    assert json.loads((words / "tokenizer.json").read_text())["model"]["type"] == "WordLevel"
