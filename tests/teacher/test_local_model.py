"""The in-process teacher against transformers' own greedy generation, one prompt at a time."""

from __future__ import annotations

import asyncio

import pytest

from sbs_edge.teacher.annotate import Settings, annotate
from sbs_edge.teacher.calls import Sampling
from sbs_edge.teacher.local_model import LocalTeacher
from sbs_edge.teacher.presets import PRESETS
from sbs_edge.teacher.prompt import Prompt


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory, desk):
    """A random GPT-2 of 100k parameters; its words mean nothing, its mechanics are the real ones."""
    torch = pytest.importorskip("torch")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("gpt2")
    words = sorted(
        {word for row in desk.train for word in row.input.split()} | set("Q:A:.") | {"So", "answer"}
    )
    vocabulary = {word: i for i, word in enumerate(["<end>", "<unk>", *words])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<end>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    config = GPT2Config(
        vocab_size=len(vocabulary), n_embd=32, n_layer=2, n_head=2, n_positions=512,
        bos_token_id=0, eos_token_id=0, initializer_range=0.4,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_batched_answers_equal_single_generation(gpt2, desk):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompts = [Prompt(text=row.input) for row in desk.train[:7]]
    teacher = LocalTeacher(str(gpt2), device="cpu", max_batch=3)

    async def every():
        return await asyncio.gather(*(teacher.answer(p, Sampling(max_tokens=12), 0) for p in prompts))

    answers = asyncio.run(every())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(gpt2).eval(), AutoTokenizer.from_pretrained(gpt2)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = tokenizer(prompt.text, return_tensors="pt").input_ids
        with torch.inference_mode():
            out = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert answer.text == tokenizer.decode(out, skip_special_tokens=True)
        assert answer.prompt_tokens == ids.shape[1]
        assert answer.finish_reason == ("stop" if 0 in out.tolist()[1:] else "length")


def test_it_takes_part_in_annotation_and_its_nonsense_is_counted(gpt2, desk, tmp_path):
    task = PRESETS["hvac"].model_copy(update={"form": "completion"})
    settings = Settings(str(gpt2), Sampling(max_tokens=8), concurrency=4)
    result = annotate(
        desk.train[:6], task, LocalTeacher(str(gpt2), device="cpu"), tmp_path / "j.jsonl", settings
    )
    assert {r.reason for r in result.results} <= {"cut-off", "marker-missing", "empty"}
    assert len(result.records) == 6
