"""Graphs over protobuf's 2 GB: constants in files beside them, written, checked, loaded and right."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from sbs_edge.errors import IntegrityError
from sbs_edge.export.api import export
from sbs_edge.runtime.bundle import Bundle, seal
from sbs_edge.runtime.student import Student

TWO_GIB = 1 << 31
VOCABULARY, WIDTH = 265_000, 1024  # an embedding and a head of 1.09 GB each
NEEDED_GIB = {"memory": 10, "disk": 10}


def available_gib() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / (1 << 20)


def initializers(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """The graph's constants, those inside its loop bodies too."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from initializers(attribute.g)


def write_wide_student(make_student: Any, folder: Path) -> Any:
    """A student whose tables are mostly zeros: the tokens its tokenizer knows have values, the rest does not matter."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    make_student(folder, rows=6)
    (folder / "model.safetensors").unlink()
    with torch.device("meta"):
        model = T5ForConditionalGeneration(
            T5Config(
                vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=16, num_heads=2, num_layers=1, num_decoder_layers=1,
                feed_forward_proj="gated-gelu", tie_word_embeddings=False, dropout_rate=0.0, decoder_start_token_id=0,
                pad_token_id=0, eos_token_id=1,
            )
        )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, parameter in model.state_dict().items():
        values = torch.zeros(parameter.shape)  # untouched pages take no memory
        part = values[:200] if len(values) == VOCABULARY else values
        part.copy_(
            torch.randn(part.shape, generator=generator) / (1 if "norm" in name else part.shape[-1] ** 0.5)
        )
        state[name] = values
    embedding = state["shared.weight"]
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        state[name] = embedding
    model.load_state_dict(state, assign=True)
    model.eval().save_pretrained(folder)
    return model


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_graph_over_two_gigabytes_is_written_and_answers(make_student: Any, tmp_path: Path) -> None:
    import torch

    if available_gib() < NEEDED_GIB["memory"] or shutil.disk_usage(tmp_path).free < NEEDED_GIB["disk"] << 30:
        pytest.skip(f"needs {NEEDED_GIB['memory']} GiB of memory and {NEEDED_GIB['disk']} GiB of disk free")
    student = tmp_path / "student"
    model = write_wide_student(make_student, student)
    result = export(student, tmp_path / "bundle", targets=("cpu-fp32",))
    assert result.report["pytorch"]["max_relative_error"] < 1e-4
    (student / "model.safetensors").unlink()
    folder = tmp_path / "bundle" / "cpu-fp32"
    graph = onnx.load(str(folder / "explainer.onnx"), load_external_data=False)
    held = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in initializers(graph.graph)
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    assert sum(int(entry["length"]) for entry in held.values()) > TWO_GIB
    assert {entry["location"] for entry in held.values()} <= {path.name for path in folder.glob("*.bin")}
    assert (folder / "explainer.onnx").stat().st_size < 1 << 20
    with Student.load(tmp_path / "bundle", prepacked_cache=False, threads=1) as loaded:
        text = "hot pump"
        ids = torch.tensor([loaded.tokenize([text], "rationale")[0]])
        with torch.no_grad():
            expected = model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False)[0, 1:].tolist()
        (found,) = loaded._graphs.generate([ids[0].tolist()], {}, 4)
        assert found[0] == expected
        ids = torch.tensor([loaded.tokenize([text])[0]])
        with torch.no_grad():
            logits = model(input_ids=ids, decoder_input_ids=torch.tensor([[0]])).logits[0, 0]
        columns = [
            row[0]
            for row in json.loads((tmp_path / "bundle/manifest.json").read_text())["labels"]["token_ids"]
        ]
        np.testing.assert_allclose(
            loaded.label_scores([text])[0], logits[columns].numpy(), rtol=1e-4, atol=1e-4
        )
    for folder in (tmp_path / "bundle", student):
        shutil.rmtree(folder)


@pytest.mark.parametrize("location", ["../../outside.bin", "/etc/hostname", "../tokenizer.json"])
def test_constants_of_an_export_may_not_leave_their_folder(
    make_student: Any, tmp_path: Path, location: str
) -> None:
    # As the runtime checks a bundle of any size: every location that a graph names, before the graph is opened.
    bundle = export(
        make_student(tmp_path / "student", rows=2), tmp_path / "bundle", targets=("cpu-fp32",)
    ).path
    (tmp_path / "outside.bin").write_bytes(bytes(1 << 20))
    path = bundle / "cpu-fp32" / "label_scorer.onnx"
    graph = onnx.load(str(path), load_external_data=False)
    entry = next(e for tensor in graph.graph.initializer for e in tensor.external_data if e.key == "location")
    assert (path.parent / entry.value).is_file()
    entry.value = location
    path.write_bytes(graph.SerializeToString())
    seal(bundle, json.loads((bundle / "manifest.json").read_text()))
    with pytest.raises(IntegrityError, match="constants from"):
        Bundle.open(bundle)
