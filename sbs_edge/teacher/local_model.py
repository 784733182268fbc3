"""A teacher in this process, with any causal or sequence-to-sequence transformers model."""

from __future__ import annotations

import asyncio
from typing import Any

from sbs_edge.errors import MissingExtra, UsageError
from sbs_edge.resources import limit_torch_threads
from sbs_edge.teacher.calls import Answer, CallFailed, Sampling
from sbs_edge.teacher.prompt import Prompt

__all__ = ["LocalTeacher"]


class LocalTeacher:
    """Loads ``model`` once; calls that wait at the same time are generated as one batch.

    Args:
        model: hub name or directory.
        device: ``cpu``, ``cuda``, or None for CUDA if there is a GPU.
        max_batch: most prompts generated together.

    """

    def __init__(self, model: str, *, device: str | None = None, max_batch: int = 8) -> None:
        try:
            import torch
            from transformers import (
                AutoConfig,
                AutoModelForCausalLM,
                AutoModelForSeq2SeqLM,
                AutoTokenizer,
            )
        except ImportError as error:
            raise MissingExtra("transformers", "train", "An in-process teacher") from error
        self.model = model
        self._torch = torch
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            config = AutoConfig.from_pretrained(model)
            self._seq2seq = bool(getattr(config, "is_encoder_decoder", False))
            kind = AutoModelForSeq2SeqLM if self._seq2seq else AutoModelForCausalLM
            self._tokenizer: Any = AutoTokenizer.from_pretrained(model, padding_side="left")
            limit_torch_threads()
            self._model: Any = kind.from_pretrained(model).to(self._device).eval()
        except (OSError, ValueError) as error:
            raise UsageError(f"The teacher {model!r} cannot be loaded: {error}") from error
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._max_batch = max_batch
        self._waiting: list[tuple[Prompt, Sampling, int, asyncio.Future[Answer]]] = []
        self._runner: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """Drop the model."""
        self._model = None

    async def answer(self, prompt: Prompt, sampling: Sampling, sample: int) -> Answer:
        """Queue the prompt; it is generated together with the other waiting prompts."""
        done: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((prompt, sampling, sample, done))
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._drain())
        return await done

    async def _drain(self) -> None:
        await asyncio.sleep(0)  # let the calls that start together queue up
        while self._waiting:
            batch, self._waiting = self._waiting[: self._max_batch], self._waiting[self._max_batch :]
            try:
                answers = await asyncio.to_thread(self._generate, batch)
            except Exception as error:
                for *_, done in batch:
                    if not done.done():
                        done.set_exception(CallFailed("generation", f"{type(error).__name__}: {error}"))
                continue
            for (*_, done), answer in zip(batch, answers, strict=True):
                if not done.done():
                    done.set_result(answer)

    def _text(self, prompt: Prompt) -> str:
        if prompt.text is not None:
            return prompt.text
        if self._tokenizer.chat_template is None:
            raise UsageError(
                f"The teacher {self.model!r} has no chat template. Set 'form: completion' in the task file."
            )
        return str(
            self._tokenizer.apply_chat_template(
                prompt.as_messages(), tokenize=False, add_generation_prompt=True
            )
        )

    def _generate(self, batch: list[tuple[Prompt, Sampling, int, asyncio.Future[Answer]]]) -> list[Answer]:
        torch, tokenizer, sampling = self._torch, self._tokenizer, batch[0][1]
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed + batch[0][2])
        encoded = tokenizer([self._text(prompt) for prompt, *_ in batch], return_tensors="pt", padding=True)
        encoded.pop("token_type_ids", None)
        sampled = sampling.temperature > 0
        options: dict[str, Any] = {"do_sample": sampled}
        if sampled:
            options |= {"temperature": sampling.temperature, "top_p": sampling.top_p or 1.0}
        with torch.inference_mode():
            output = self._model.generate(
                **encoded.to(self._device),
                max_new_tokens=sampling.max_tokens,
                pad_token_id=tokenizer.pad_token_id,
                **options,
            )
        start = 0 if self._seq2seq else encoded["input_ids"].shape[1]
        asked = encoded["attention_mask"].sum(-1).tolist()
        return [
            self._answer(prompt, row[start:].tolist(), n_asked)
            for (prompt, *_), row, n_asked in zip(batch, output, asked, strict=True)
        ]

    def _answer(self, prompt: Prompt, tokens: list[int], n_asked: int) -> Answer:
        ends = {self._tokenizer.eos_token_id}
        generation = getattr(self._model.generation_config, "eos_token_id", None)
        ends |= set(generation if isinstance(generation, list) else [generation]) - {None}
        stop = next((i for i, token in enumerate(tokens) if token in ends and i > 0), None)
        body = tokens if stop is None else tokens[:stop]
        text = self._tokenizer.decode(body, skip_special_tokens=True)
        cut = min((at for word in prompt.stop if (at := text.find(word)) >= 0), default=None)
        finished = stop is not None or cut is not None
        return Answer(
            text if cut is None else text[:cut], "stop" if finished else "length", int(n_asked), len(body)
        )
