"""Inputs, float64 reference and tolerance of the kernel bench."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sbs_edge.bench.kernels import matmul_peak, reference_error
from sbs_edge.bench.kernels.cases import (
    IGNORED,
    Case,
    Inputs,
    cases_of,
    make_inputs,
    parse_shapes,
    student_states,
)
from sbs_edge.bench.kernels.reference_error import judge, measure_truth
from sbs_edge.errors import DataError, UsageError

CPU = torch.device("cpu")


def _full(inputs: Inputs, dtype: torch.dtype, scale: float) -> tuple[torch.Tensor, ...]:
    """Loss and gradients with full logits, by autograd."""
    h, w = (x.detach().to(dtype).requires_grad_() for x in (inputs.hidden, inputs.weight))
    loss = F.cross_entropy(h @ w.t(), inputs.targets, ignore_index=IGNORED)
    return (loss.detach(), *torch.autograd.grad(loss, (h, w), loss.new_tensor(scale)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_truth_is_what_autograd_finds_in_float64(dtype, monkeypatch):
    # 40 rows in blocks of 7; 2500 classes, so that classes are subsampled.
    monkeypatch.setattr(reference_error, "_BLOCK_BYTES", {"cpu": 7 * 2500 * 32})
    monkeypatch.setattr(reference_error, "_ROWS", 11)
    inputs = make_inputs(Case(40, 12, 2500, dtype), CPU, 3)
    truth = measure_truth(inputs, 3)
    assert truth.scale == (640.0 if dtype == "float16" else 1.0)
    assert len(truth.rows) == 11
    assert len(truth.classes) < 2048
    loss, dx, dw = _full(inputs, torch.float64, truth.scale)
    torch.testing.assert_close(truth.loss, float(loss), rtol=1e-12, atol=0)
    torch.testing.assert_close(truth.grad_hidden, dx[truth.rows], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(truth.grad_weight, dw[truth.classes], rtol=1e-9, atol=1e-12)
    # Plain torch's error is what full logits in that precision really have.
    found = truth.errors(*_full(inputs, getattr(torch, dtype), truth.scale), inputs)
    for name in ("hidden_rel_l2", "weight_rel_l2"):
        assert found[name] == pytest.approx(truth.plain[name], rel=0.1)
    assert judge(found, truth.plain, torch.finfo(getattr(torch, dtype)).eps) is None


def test_a_gradient_of_an_ignored_row_is_an_error():
    inputs = make_inputs(Case(20, 4, 30, padding=0.5), CPU, 0)
    assert len(inputs.targets) == 40
    assert int((inputs.targets != IGNORED).sum()) == 20
    assert (inputs.targets[inputs.valid] != IGNORED).all()
    compacted = inputs.compacted()
    assert torch.equal(compacted.hidden, inputs.hidden[inputs.valid])
    truth = measure_truth(compacted, 0)
    loss, dx, dw = _full(inputs, torch.float32, 1.0)
    fine = truth.errors(loss, dx, dw, inputs)
    assert fine["ignored_rows"] == 0.0
    assert judge(fine, truth.plain, 1.2e-7) is None
    dx[inputs.targets == IGNORED] = 1e-9
    assert "ignored rows" in str(judge(truth.errors(loss, dx, dw, inputs), truth.plain, 1.2e-7))


def test_the_tolerance_is_twice_plain_torch_s_error():
    plain = {"hidden_rel_l2": 1e-3, "weight_rel_l2": 1e-3, "loss": 1e-3}
    assert judge(dict.fromkeys(plain, 1.99e-3), plain, 1e-7) is None
    for name, what in (("hidden_rel_l2", "dX"), ("weight_rel_l2", "dW"), ("loss", "loss")):
        assert what in str(judge({**plain, name: 2.01e-3}, plain, 1e-7))
        assert what in str(judge({**plain, name: float("nan")}, plain, 1e-7))
    exact = dict.fromkeys(plain, 0.0)  # plain torch was lucky: float32's own noise is no fault
    assert judge({"hidden_rel_l2": 2e-8, "weight_rel_l2": 2e-8, "loss": 1.9e-6}, exact, 1.2e-7) is None
    assert judge({"hidden_rel_l2": 4e-8, "weight_rel_l2": 0.0, "loss": 0.0}, exact, 1.2e-7) is not None
    assert judge({**exact, "loss": 2.1e-6}, exact, 1.2e-7) is not None


def test_data_kinds_are_what_they_say():
    def top(kind: str) -> torch.Tensor:
        x = make_inputs(Case(64, 32, 500, data=kind), CPU, 0)
        return (x.hidden @ x.weight.t()).softmax(1).gather(1, x.targets.unsqueeze(1))

    assert top("peaked").median() > 0.9
    assert (top("flat") * 500 - 1).abs().max() < 0.1
    assert 1e-4 < top("random").median() < 1e-2
    again = [make_inputs(Case(8, 4, 20), CPU, 5).hidden for _ in range(2)]
    assert torch.equal(*again)


def test_a_student_s_states_are_those_its_loss_is_taken_from(tiny_student):
    from transformers import AutoModelForSeq2SeqLM

    from sbs_edge.training.student_dir import StudentDir

    states, targets, head = student_states(tiny_student, rows=2)
    opened = StudentDir.load(tiny_student)
    row = opened.validation()[0]
    ids = torch.tensor([opened.tokenizer().encode(opened.prefixes["label"] + row.input).ids])
    labels = torch.tensor([opened.tokenizer().encode(row.label).ids])
    model = AutoModelForSeq2SeqLM.from_pretrained(str(tiny_student)).eval()
    with torch.no_grad():
        wanted = model(input_ids=ids, labels=labels).loss
    n = labels.numel()
    assert torch.equal(targets[:n], labels.flatten())
    torch.testing.assert_close(
        F.cross_entropy(states[:n] @ head.t(), targets[:n]), wanted, rtol=1e-5, atol=1e-5
    )
    (case,) = cases_of([(70, 1, 1)], ["float32"], [0.0], ["student"], tiny_student)
    assert (case.d, case.v) == (64, 512)
    made = make_inputs(case, CPU, 0, tiny_student)
    assert made.hidden.shape == (70, 64)
    with pytest.raises(DataError, match="the case asks"):
        make_inputs(Case(4, 64, 100, data="student"), CPU, 0, tiny_student)


def test_shapes_and_cases_are_read_in_order():
    assert parse_shapes("1,2,3; 4,5,6") == ((1, 2, 3), (4, 5, 6))
    for wrong in ("", "1,2", "1,2,x", "0,1,2"):
        with pytest.raises(UsageError):
            parse_shapes(wrong)
    names = [case.name for case in cases_of([(8, 4, 9)], ["float32"], [0.0, 0.3], ["flat", "random"])]
    assert names == [
        "N=8 D=4 V=9 float32, 0% padding, flat", "N=8 D=4 V=9 float32, 30% padding, flat",
        "N=8 D=4 V=9 float32, 0% padding, random", "N=8 D=4 V=9 float32, 30% padding, random",
    ]  # fmt: skip


def test_the_roof_counts_the_products_it_times():
    clock = matmul_peak.Clock(CPU)
    found = matmul_peak.product_rates(clock, 32, 16, 24, torch.float32, repeats=2)
    total = sum(found["ms"].values())
    assert found["tflops"] == pytest.approx(6 * 32 * 16 * 24 / total / 1e9)
    assert matmul_peak.slice_width(2048, 32128, 4, "cpu") == 8192
    assert matmul_peak.slice_width(4096, 250112, 2, "cuda") == 32768
    assert matmul_peak.slice_width(10**6, 32128, 4, "cuda") == 1024
    assert matmul_peak.slice_width(10, 50, 4, "cpu") == 50
