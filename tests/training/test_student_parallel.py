"""Two processes over gloo against one process: losses, gradients, resuming at another world size."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file

from sbs_edge.training.batches import Batches, Collator, Encoded, MemoryRows

SETTING = """
    import dataclasses, sys
    from pathlib import Path
    from sbs_edge.data.builtin import builtin_splits
    from sbs_edge.data.example import Splits
    from sbs_edge.training.train import train
    full = builtin_splits("ci")
    # every third row has a rationale, and of uneven length: means of means would differ from the mean
    rows = [dataclasses.replace(r, rationale=r.rationale * (1 + i % 2) if i % 3 == 0 else None)
            for i, r in enumerate(full.train[:21])]
    splits = Splits(full.task, rows, full.validation[:20], [])
    options = dict(d_model=16, d_ff=32, n_heads=2, n_layers=1, n_decoder_layers=1, trackers=(), threads=1,
                   clip_norm=0.0, eval_batch_size=6, select="last")
"""
RUN = """
    extra = dict(arg.split("=") for arg in sys.argv[2:])
    extra = {name: float(v) if "." in v else v == "True" if v in ("True", "False") else int(v)
             for name, v in extra.items()}
    train(splits, Path(sys.argv[1]), **options, **extra)
"""
# Both processes meet a batch in which one of them has no rationale row, then one without any row.
GRADIENTS = """
    import os, torch, torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from transformers import T5Config, T5ForConditionalGeneration
    from sbs_edge.training.batches import Collator, Encoded
    from sbs_edge.training.model import TwoTaskModel
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    student = T5ForConditionalGeneration(T5Config(vocab_size=61, d_model=24, d_kv=8, d_ff=40, num_layers=2,
        num_heads=3, dropout_rate=0.0, decoder_start_token_id=0))
    rows = [Encoded((([5, 6, 7, 1], [9, 1]), ([4, 6, 7, 8, 1], [11, 12, 13, 14, 1]))),
            Encoded((([5, 8, 1], [10, 1]), None)), Encoded((([5, 9, 9, 1], [10, 3, 1]), ([4, 9, 1], [12, 1])))]
    collate = Collator(pad_id=0, eos_id=1, start_id=0)
    judge = TwoTaskModel(student, 2.0)
    cases = [[[rows[0], rows[2]], [rows[1]]], [rows, []]]
    wrapped = None
    for case in cases:
        judge.zero_grad()
        whole = judge(**collate([row for part in case for row in part]))
        whole["loss"].backward()
        wanted = {name: p.grad.clone() for name, p in judge.named_parameters()}
        judge.zero_grad()
        if wrapped is None:
            if sys.argv[1] == "fsdp":
                from torch.distributed.device_mesh import init_device_mesh
                from torch.distributed.fsdp import fully_shard
                mesh = init_device_mesh("cpu", (2,))
                import copy
                wrapped = copy.deepcopy(judge)
                for block in [*wrapped.core.encoder.block, *wrapped.core.decoder.block]:
                    fully_shard(block, mesh=mesh)
                fully_shard(wrapped, mesh=mesh)
            else:
                import copy
                wrapped = DistributedDataParallel(copy.deepcopy(judge))
        wrapped.zero_grad()
        batch = collate(case[rank])
        total = batch["denominators"].clone()
        dist.all_reduce(total)
        batch["denominators"] = total / 2
        out = wrapped(**batch)
        out["loss"].backward()
        losses = out["losses"].clone()
        dist.all_reduce(losses)
        torch.testing.assert_close(losses / 2, whole["losses"], rtol=1e-5, atol=1e-6)
        for name, p in wrapped.named_parameters():
            grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            torch.testing.assert_close(grad, wanted[name.removeprefix("module.")], rtol=1e-4, atol=1e-6, msg=name)
    dist.barrier()
    dist.destroy_process_group()
"""


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def run_script(repository, tmp_path, text, *args, processes=1):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SETTING) + textwrap.dedent(text))
    launcher = (
        ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-addr", "127.0.0.1",
         "--master-port", str(free_port())]
        if processes > 1
        else ["-P"]
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, *launcher, str(script), *map(str, args)],
        cwd=repository, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": str(repository), "PYTHONSAFEPATH": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def assert_near(first, second):
    one, two = (load_file(folder / "model.safetensors") for folder in (first, second))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=2e-3, atol=2e-4)


@pytest.mark.long
def test_two_processes_equal_one_with_twice_the_batch(repository, tmp_path):
    """Two epochs of 21 rows in batches of 8: the last step has 2 rows, one for each process."""
    run_script(repository, tmp_path, RUN, tmp_path / "one", "batch_size=8", "epochs=2")
    run_script(repository, tmp_path, RUN, tmp_path / "two", "batch_size=4", "epochs=2", processes=2)
    histories = [json.loads((tmp_path / name / "history.json").read_text()) for name in ("one", "two")]
    assert len(histories[0]) == len(histories[1])
    for one, two in zip(*histories, strict=True):
        for key in (
            "label_loss",
            "rationale_loss",
            "eval_label_loss",
            "eval_rationale_loss",
            "eval_label_accuracy",
        ):
            assert (key in two) == (key in one)
            if key in one:
                assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-4), key
    assert_near(tmp_path / "one", tmp_path / "two")


@pytest.mark.long
def test_a_checkpoint_resumes_at_another_world_size(repository, tmp_path):
    """One process stops after 4 steps; two continue with half the batch each, as one would have."""
    flags = ("max_steps=8", "save_steps=4", "eval_steps=4")
    run_script(repository, tmp_path, RUN, tmp_path / "whole", "batch_size=8", *flags)
    run_script(repository, tmp_path, RUN, tmp_path / "cut", "batch_size=8", *flags)
    # what a kill right after the checkpoint of step 4 leaves
    work = tmp_path / "cut.training"
    shutil.rmtree(work / "checkpoint-8")
    shutil.rmtree(tmp_path / "cut")
    run_script(
        repository, tmp_path, RUN, tmp_path / "cut", "batch_size=4", *flags, "resume=True", processes=2
    )
    card = json.loads((tmp_path / "cut" / "sbs_edge.json").read_text())
    assert card["training"]["resumed_from_step"] == 4
    assert card["training"]["world"] == 2
    assert_near(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.long
def test_sharded_training_equals_one_process_and_its_checkpoints_fit_any_run(repository, tmp_path):
    """One row a process and step: most often a process has no rationale; in step 11 one has no row."""
    flags = ("epochs=1", "save_steps=4", "eval_steps=4")
    one, two = ("batch_size=2", *flags), ("batch_size=1", *flags)
    run_script(repository, tmp_path, RUN, tmp_path / "one", *one)
    run_script(repository, tmp_path, RUN, tmp_path / "sharded", *two, "fsdp=True", processes=2)
    histories = [json.loads((tmp_path / name / "history.json").read_text()) for name in ("one", "sharded")]
    assert [row["step"] for row in histories[0]] == [row["step"] for row in histories[1]] == [4, 8, 11]
    for first, second in zip(*histories, strict=True):
        losses = [name for name in first if name.endswith("loss")]
        assert len(losses) >= 3
        assert set(first) == set(second)
        for name in losses:
            assert second[name] == pytest.approx(first[name], rel=1e-4), name
    assert_near(tmp_path / "one", tmp_path / "sharded")

    work = tmp_path / "sharded.training"
    for folder in work.glob("checkpoint-*"):
        whole = load_file(folder / "student.safetensors")
        assert {name: value.shape for name, value in whole.items()} == {
            name: value.shape
            for name, value in load_file(
                tmp_path / "one.training" / folder.name / "student.safetensors"
            ).items()
        }
    shutil.rmtree(work / "checkpoint-11")  # what a kill after step 8 leaves
    for name in ("alone", "replicated", "again"):
        shutil.copytree(work, tmp_path / f"{name}.training")
    run_script(repository, tmp_path, RUN, tmp_path / "alone", *one, "resume=True")
    run_script(repository, tmp_path, RUN, tmp_path / "replicated", *two, "resume=True", processes=2)
    run_script(repository, tmp_path, RUN, tmp_path / "again", *two, "resume=True", "fsdp=True", processes=2)
    for name in ("alone", "replicated", "again"):
        card = json.loads((tmp_path / name / "sbs_edge.json").read_text())
        assert card["training"]["resumed_from_step"] == 8
        assert_near(tmp_path / "one", tmp_path / name)

    # and the other way: what one process left, two go on with in shards
    shutil.copytree(tmp_path / "one.training", tmp_path / "spread.training")
    shutil.rmtree(tmp_path / "spread.training" / "checkpoint-11")
    run_script(repository, tmp_path, RUN, tmp_path / "spread", *two, "resume=True", "fsdp=True", processes=2)
    assert_near(tmp_path / "one", tmp_path / "spread")


@pytest.mark.long
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_gradients_are_of_global_means_with_a_task_or_all_rows_on_one_rank(repository, tmp_path, engine):
    run_script(repository, tmp_path, GRADIENTS, engine, processes=2)


@pytest.mark.parametrize(("rows", "batch", "passes"), [(10, 4, 1), (7, 2, 2), (3, 4, 1), (9, 1, 3)])
@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_rows_without_gap_or_repeat(rows, batch, passes, world):
    """Every row once an epoch, whatever the world size, and equally many passes for each process."""
    data = [Encoded((([10 + i, 1], [10 + i, 1]), None)) for i in range(rows)]
    collate = Collator(pad_id=0, eos_id=1, start_id=0)
    steps = -(-rows // (batch * passes * world))

    def seen(rank, total):
        batches = Batches(
            MemoryRows(data, 0), collate, last_row=rows, steps=steps, batch_size=batch * world // total,
            passes=passes, rank=rank, world=total,
        )  # fmt: skip
        return [sorted(int(t) for t in b["targets"] if t > 1) for b in batches]

    shares = [seen(rank, world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    per_step = [
        sorted(t for share in shares for part in share[s * passes : (s + 1) * passes] for t in part)
        for s in range(steps)
    ]
    alone = seen(0, 1)
    assert per_step == [
        sorted(t for part in alone[s * passes : (s + 1) * passes] for t in part) for s in range(steps)
    ]
    assert sorted(t for step in per_step for t in step) == [10 + i for i in range(rows)]
