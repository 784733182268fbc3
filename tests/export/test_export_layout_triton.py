"""The Triton model repository, judged by Triton's own protobuf schema and by running what it names."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from sbs_edge.errors import UsageError

model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")
pytest.importorskip("torch")

TYPES = {"TYPE_INT64": "tensor(int64)", "TYPE_FP32": "tensor(float)"}


@pytest.fixture(scope="module", params=["closed", "choices", "open"])
def bundle(request, tmp_path_factory):
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    from sbs_edge.data.builtin import builtin_splits
    from sbs_edge.data.jsonl import write_examples
    from sbs_edge.data.tokenizer import build_tokenizer
    from sbs_edge.export.api import export
    from sbs_edge.training.student_dir import StudentDir

    kind, root = request.param, tmp_path_factory.mktemp(request.param)
    student, splits = root / "student", builtin_splits("ci")
    student.mkdir()
    prefixes = {"label": "[label] ", "rationale": "[rationale] "}
    texts = [text for e in splits.train for text in (e.input, e.label, e.rationale) if text]
    tokenizer = build_tokenizer(texts, list(prefixes.values()))
    tokenizer.save(str(student / "tokenizer.json"))
    torch.manual_seed(0)
    T5ForConditionalGeneration(
        T5Config(
            vocab_size=(tokenizer.get_vocab_size() + 7) // 8 * 8, d_model=32, d_kv=8, d_ff=64, num_layers=1,
            num_heads=4, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
        )
    ).save_pretrained(student)  # fmt: skip
    task = splits.task if kind == "closed" else replace(splits.task, label_kind=kind, labels=())
    card = {
        "format": 1, "task": StudentDir.task_card(task), "prefixes": prefixes, "mode": "stepwise",
        "rationale_weight": 1.0, "max_source_tokens": 128, "max_target_tokens": 12, "max_label_tokens": 4,
        "seed": 0, "versions": {}, "training": {},
    }  # fmt: skip
    (student / "sbs_edge.json").write_text(json.dumps(card))
    rows = [
        e if kind != "choices" else replace(e, choices=splits.task.labels) for e in splits.validation[:32]
    ]
    write_examples(student / "validation.jsonl", rows)
    write_examples(student / "calibration.jsonl", splits.train[:32])
    export(student, root / "bundle", targets=("cpu-int8", "cpu-fp32"), max_drop=100)
    export(student, root / "gpu", targets=("cuda-fp16",), max_drop=100, unguarded=True)
    return root / "bundle"


def configs(repository):
    from google.protobuf import text_format

    found = {}
    for path in sorted(repository.glob("*/config.pbtxt")):
        found[path.parent.name] = text_format.Parse(path.read_text(), model_config_pb2.ModelConfig())
    return found


def test_every_config_fits_the_schema_and_the_graph_it_names(bundle, tmp_path):
    import onnxruntime as ort

    from sbs_edge.export.layouts.triton import write_triton_repository

    repository = write_triton_repository(bundle, tmp_path / "repository")
    manifest = json.loads((bundle / "manifest.json").read_text())
    roles = [
        r
        for t in manifest["targets"].values()
        for r in t
        if r in ("label_scorer", "choice_scorer", "explainer")
    ]
    found = configs(repository)
    assert len(found) == len(roles)
    for name, config in found.items():
        assert config.name == name
        assert config.platform == "onnxruntime_onnx"
        assert config.max_batch_size == 64
        assert config.dynamic_batching.default_queue_policy.max_queue_size == 1024
        assert config.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_CPU
        session = ort.InferenceSession(str(repository / name / "1" / "model.onnx"))
        for side, tensors in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
            assert [t.name for t in side] == [t.name for t in tensors]
            for described, real in zip(side, tensors, strict=True):
                assert TYPES[model_config_pb2.DataType.Name(described.data_type)] == real.type
                dims = [-1 if isinstance(d, str) else d for d in real.shape[1:]]
                # Triton's rule: dims, or the reshape of them, is the shape without its batch dimension.
                assert (
                    list(described.reshape.shape if described.HasField("reshape") else described.dims) == dims
                )
                assert len(described.dims) >= 1
        if name.endswith("label_scorer"):
            labels = (repository / name / "labels.txt").read_text().splitlines()
            assert labels == manifest["labels"]["labels"]
            assert config.output[0].label_filename == "labels.txt"
            assert list(config.output[0].dims) == [len(labels)]


def test_the_repository_gives_the_bundles_answers(bundle, tmp_path):
    """A client that follows the repository's README gets what the bundle's own runtime gives."""
    import onnxruntime as ort

    from sbs_edge.data.builtin import builtin_splits
    from sbs_edge.export.layouts.triton import write_triton_repository
    from sbs_edge.runtime.student import Student
    from sbs_edge.tokens import TextTokenizer, read_tokenizer

    repository = write_triton_repository(
        bundle, tmp_path / "repository", targets=["cpu-int8"], model_version=3
    )
    tokenizer = TextTokenizer(read_tokenizer(repository / "tokenizer" / "tokenizer.json"))
    texts = [e.input for e in builtin_splits("ci").test[:6]]

    def encoded(prefix):
        rows = [tokenizer.encode(text, prefix) for text in texts]
        width = -(-max(map(len, rows)) // 16) * 16
        ids = np.array([row + [0] * (width - len(row)) for row in rows], np.int64)
        return {"input_ids": ids, "attention_mask": (ids != 0).astype(np.int64)}

    with Student.load(bundle, target="cpu-int8") as student:
        for config in configs(repository).values():
            session = ort.InferenceSession(str(repository / config.name / "3" / "model.onnx"))
            if config.name.endswith("label_scorer"):
                (scores,) = session.run(["scores"], encoded("[label] "))
                got = [student.labels[i] for i in scores.argmax(-1)]
                assert got == [p.label for p in student.predict(texts)]
            elif config.name.endswith("explainer"):
                tokens, _ = session.run(None, encoded("[rationale] "))
                got = [tokenizer.decode(_until_end(row)) for row in tokens.tolist()]
                assert got == [e.rationale for e in student.explain(texts)]


def _until_end(row):
    return row[: row.index(1)] if 1 in row else row


def test_a_gpu_targets_repository_says_what_it_leaves_out(bundle, tmp_path):
    import onnxruntime as ort

    from sbs_edge.data.builtin import builtin_splits
    from sbs_edge.export.layouts.triton import write_triton_repository
    from sbs_edge.runtime.student import Student

    gpu = bundle.parent / "gpu"
    kind = json.loads((gpu / "manifest.json").read_text())["task"]["label_kind"]
    if kind == "open":  # nothing but steps
        with pytest.raises(UsageError, match="only generates"):
            write_triton_repository(gpu, tmp_path / "r")
        assert not (tmp_path / "r").exists()
        return
    repository = write_triton_repository(gpu, tmp_path / "r")
    (config,) = configs(repository).values()
    assert config.name.endswith("label_scorer" if kind == "closed" else "choice_scorer")
    assert config.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
    readme = (repository / "README.md").read_text()
    assert "cuda-fp16: no rationales here" in readme
    assert "# for rationales" not in readme
    assert ("labels.txt" in readme) == (kind == "closed")
    session = ort.InferenceSession(str(repository / config.name / "1" / "model.onnx"))
    assert [t.name for t in session.get_inputs()] == [t.name for t in config.input]
    assert TYPES[model_config_pb2.DataType.Name(config.output[0].data_type)] == session.get_outputs()[0].type
    if kind == "closed":
        texts = [e.input for e in builtin_splits("ci").test[:4]]
        with Student.load(gpu, providers=["CPUExecutionProvider"]) as student:
            rows = student.tokenize(texts)
            for text, ids in zip(texts, rows, strict=True):
                (scores,) = session.run(
                    None, {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
                )
                assert student.labels[int(scores[0].argmax())] == student.predict([text])[0].label


def test_wrong_requests_are_refused_and_nothing_is_left(bundle, tmp_path):
    from sbs_edge.export.layouts.triton import write_triton_repository

    with pytest.raises(UsageError, match="no target 'gpu'"):
        write_triton_repository(bundle, tmp_path / "r", targets=["gpu"])
    with pytest.raises(UsageError, match="max_batch_size"):
        write_triton_repository(bundle, tmp_path / "r", max_batch_size=0)
    assert not (tmp_path / "r").exists()


def test_gpu_targets_ask_for_the_gpu_and_tensorrt():
    from google.protobuf import text_format

    from sbs_edge.export.layouts import triton as layout_triton

    message = layout_triton._text(
        {
            "name": "m",
            "instance_group": [{"count": 1, "kind": layout_triton._kind(["CUDAExecutionProvider"])}],
            **layout_triton._accelerator(["NvTensorRTRTXExecutionProvider"]),
        }
    )
    config = text_format.Parse(message, model_config_pb2.ModelConfig())
    assert config.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
    assert config.optimization.execution_accelerators.gpu_execution_accelerator[0].name == "tensorrt"
