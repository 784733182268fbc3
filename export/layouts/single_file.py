"""A graph from text to label, in which the tokenizer is an operator of onnxruntime-extensions.

``text (1,) string -> label (1,) string, probabilities (1, K) float32``, with one text per call. The extension's
tokenizer reads the same ``tokenizer.json``, so only the kinds that it knows can be embedded (unigram and BPE), and
only where its library can be loaded: on any CPU, but not in TensorRT. Constants are inside the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from sbs_edge.errors import MissingExtra, UsageError
from sbs_edge.export.assemble import GraphInputs, precision_of
from sbs_edge.export.graphs.builder import OPSET
from sbs_edge.export.graphs.label import build_label_classifier
from sbs_edge.export.graphs.trie import build_trie_classifier
from sbs_edge.export.targets import Target
from sbs_edge.runtime.ort import onnxruntime_module
from sbs_edge.tokens import TextTokenizer
from sbs_edge.training.student_dir import StudentDir

__all__ = ["write_single_file"]

onnxruntime = onnxruntime_module()

EXTENSIONS = "ai.onnx.contrib"
CHECKED_ROWS = 16
KINDS = {"Unigram": "T5Tokenizer", "BPE": "GPT2Tokenizer"}


def write_single_file(root: Path, target: Target, opened: StudentDir, recipe: GraphInputs) -> str:
    """Write ``<target>/single_file.onnx`` under ``root``; return that relative path.

    Raises:
        UsageError: the target, the kind of labels or the tokenizer cannot be put into one file.
    """
    plan = recipe.plan
    if "CPUExecutionProvider" not in target.providers:
        raise UsageError(
            f"A single file needs the tokenizer operator, which {target.name} cannot run. Use a cpu target, or leave "
            "out single_file."
        )
    if plan.kind != "closed":
        raise UsageError("A single file needs a closed label set; this student's labels are not closed.")
    saved = json.loads((opened.companion("tokenizer.json")).read_text(encoding="utf-8"))
    kind = saved["model"].get("type", "BPE")
    if kind not in KINDS:
        raise UsageError(
            f"The tokenizer is of the kind {kind!r}; only {' and '.join(KINDS)} can be put into a graph. Train with "
            "tokenizer='unigram', or leave out single_file."
        )
    precision = precision_of(target, recipe)
    if plan.method == "first-token":
        model = build_label_classifier(recipe.weights, precision, [ids[0] for ids in plan.token_ids])
    else:
        model = build_trie_classifier(recipe.weights, precision, plan.token_ids)
    hidden = _without_control_tokens(saved, opened.text_tokenizer())
    _put_tokenizer_in_front(model, opened, recipe, json.dumps(hidden, ensure_ascii=False), KINDS[kind])
    _put_labels_behind(model, plan.labels)
    name = f"{target.name}/single_file.onnx"
    content = model.SerializeToString()
    _check(content, root / target.name / "label_scorer.onnx", opened, recipe.weights.eos_id)
    (root / name).write_bytes(content)
    return name


def _check(content: bytes, scorer: Path, opened: StudentDir, eos_id: int) -> None:
    """Raise an error if the extension's tokenizer reads a validation row differently from the bundle's.

    Raises:
        UsageError: the probabilities differ on a row.
        MissingExtra: onnxruntime-extensions is not installed.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(_library())
    whole = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    apart = onnxruntime.InferenceSession(str(scorer), providers=["CPUExecutionProvider"])
    tokenizer = opened.text_tokenizer()
    limit = opened.limits["max_source_tokens"]
    for text in [row.input for row in opened.validation()[:CHECKED_ROWS]] or ["a short text"]:
        ids, _ = tokenizer.encode_within(text, limit, eos_id, opened.prefixes["label"])
        row = np.array([ids], np.int64)
        (scores,) = apart.run(None, {"input_ids": row, "attention_mask": np.ones_like(row)})
        chances = np.exp(scores - scores.max())
        _, found = whole.run(None, {"text": np.array([text], dtype=object)})
        if not np.allclose(found, chances / chances.sum(), atol=1e-3):
            raise UsageError(
                f"onnxruntime-extensions reads this student's tokenizer.json differently (on {text!r}), so a single "
                "file would answer differently from the bundle. Leave out single_file."
            )


def _without_control_tokens(saved: dict[str, Any], texts: TextTokenizer) -> dict[str, Any]:
    """Return ``tokenizer.json`` with the names of its control tokens replaced, so that no text produces one.

    The graph adds end-of-sequence and the prefix's control tokens as ids, so their names are not needed. The
    new names are from the private use area.
    """
    if saved["model"].get("type") != "Unigram":
        return saved  # byte-level BPE reaches an entry only by merges, and control tokens have none
    vocab = [
        [f"\ue000{index}\ue001", score] if index in texts.control else [piece, score]
        for index, (piece, score) in enumerate(saved["model"]["vocab"])
    ]
    added = [token for token in saved.get("added_tokens") or () if token["id"] not in texts.control]
    return {**saved, "model": {**saved["model"], "vocab": vocab}, "added_tokens": added}


def _constant(model: onnx.ModelProto, name: str, value: np.ndarray) -> str:
    model.graph.initializer.append(numpy_helper.from_array(value, name))
    return name


def _own_end(opened: StudentDir, tokenizer: str, kind: str) -> int:
    """Return how many tokens the extension itself appends to a text: some versions add an end token."""
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(_library())
    node = helper.make_node(
        "HfJsonTokenizer", ["text"], ["ids"], domain=EXTENSIONS,
        tokenizer_vocab=tokenizer, tokenizer_config=json.dumps({"tokenizer_class": kind}),
    )  # fmt: skip
    text = helper.make_tensor_value_info("text", TensorProto.STRING, [1])
    graph = helper.make_graph(
        [node], "probe", [text], [helper.make_tensor_value_info("ids", TensorProto.INT64, None)]
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(EXTENSIONS, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (ids,) = session.run(None, {"text": np.array(["a short text"], dtype=object)})
    return 1 if ids.size == len(opened.tokenizer().encode("a short text").ids) else 0


def _library() -> str:
    try:
        import onnxruntime_extensions
    except ImportError as error:
        raise MissingExtra("onnxruntime-extensions", "single-file", "Embedding the tokenizer") from error
    return str(onnxruntime_extensions.get_library_path())


def _put_tokenizer_in_front(
    model: onnx.ModelProto, opened: StudentDir, recipe: GraphInputs, tokenizer: str, kind: str
) -> None:
    """Compute ``input_ids`` and ``attention_mask`` from a text: prefix, tokens, the end-of-sequence token."""
    text_tokenizer = opened.tokenizer()
    known = set(text_tokenizer.get_added_tokens_decoder())
    prefix_ids = text_tokenizer.encode(opened.prefixes["label"].rstrip()).ids[:-1]
    special = bool(prefix_ids) and all(index in known for index in prefix_ids)
    # The extension splits special tokens like any text, so a prefix of them is inserted as ids.
    before = _constant(model, "before", np.array(prefix_ids if special else [], np.int64))
    prefix_text = "" if special else opened.prefixes["label"]
    prefix = _constant(model, "prefix", np.array([prefix_text], dtype=object))
    end = _constant(model, "end", np.array([recipe.weights.eos_id], np.int64))
    room = _constant(model, "room", np.array([opened.limits["max_source_tokens"] - 1], np.int64))
    zero, flat, axis = (
        _constant(model, name, np.array(value, np.int64))
        for name, value in (("zero", [0]), ("flat", [-1]), ("axis", [0]))
    )
    strip = _own_end(opened, tokenizer, kind)
    own_end = _constant(model, "own_end", np.array([-1 if strip else np.iinfo(np.int64).max], np.int64))
    one = _constant(model, "one_id", np.array(1, np.int64))
    front = [
        helper.make_node("StringConcat", [prefix, "text"], ["prefixed"]),
        helper.make_node(
            "HfJsonTokenizer", ["prefixed"], ["raw_ids"], domain=EXTENSIONS,
            tokenizer_vocab=tokenizer, tokenizer_config=json.dumps({"tokenizer_class": kind}),
        ),
        helper.make_node("Cast", ["raw_ids"], ["wide_ids"], to=TensorProto.INT64),
        helper.make_node("Reshape", ["wide_ids", flat], ["flat_ids"]),
        helper.make_node("Slice", ["flat_ids", zero, own_end], ["text_ids"]),
        helper.make_node("Concat", [before, "text_ids"], ["all_ids"], axis=0),
        helper.make_node("Slice", ["all_ids", zero, room], ["cut_ids"]),
        helper.make_node("Concat", ["cut_ids", end], ["ended_ids"], axis=0),
        helper.make_node("Unsqueeze", ["ended_ids", axis], ["input_ids"]),
        helper.make_node("Shape", ["input_ids"], ["ids_shape"]),
        helper.make_node("Expand", [one, "ids_shape"], ["attention_mask"]),
    ]  # fmt: skip
    old = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*front, *old])
    del model.graph.input[:]
    model.graph.input.append(helper.make_tensor_value_info("text", TensorProto.STRING, [1]))
    model.opset_import.append(helper.make_opsetid(EXTENSIONS, 1))


def _put_labels_behind(model: onnx.ModelProto, labels: tuple[str, ...]) -> None:
    names = _constant(model, "label_names", np.array(list(labels), dtype=object))
    model.graph.node.extend(
        [
            helper.make_node("Softmax", ["scores"], ["probabilities"], axis=-1),
            helper.make_node("ArgMax", ["scores"], ["best"], axis=-1, keepdims=0),
            helper.make_node("Gather", [names, "best"], ["label"]),
        ]
    )
    del model.graph.output[:]
    model.graph.output.extend(
        [
            helper.make_tensor_value_info("label", TensorProto.STRING, [1]),
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, [1, len(labels)]),
        ]
    )
