"""A sequence-to-sequence student for two tasks: one encoder pass, a decoder pass per task, one loss.

It wraps any T5-family checkpoint (T5, T5 v1.1, FLAN-T5, mT5, UMT5, ByT5).
The factor between decoder output and LM head (``d_model ** -0.5`` in some tied models) is measured on
the model itself, because transformers 4 and 5 keep it in different places.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sbs_edge.kernels.cross_entropy import fused_linear_cross_entropy
from sbs_edge.training.config import TrainConfig
from sbs_edge.training.long import draw_states, encode_chunks

__all__ = [
    "TwoTaskModel",
    "add_lora",
    "build_student",
    "cache_options",
    "is_tied",
    "measure_logit_scale",
    "merge_lora",
]

LORA_LAYERS = ["q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo"]


def measure_logit_scale(student: Any) -> float:
    """Return the factor that the model applies between its decoder's output and its LM head."""
    seen: dict[str, Tensor] = {}
    hooks = [
        student.get_decoder().register_forward_hook(lambda _m, _i, out: seen.__setitem__("out", out[0])),
        student.lm_head.register_forward_pre_hook(lambda _m, args: seen.__setitem__("in", args[0])),
    ]
    was_training = student.training
    try:
        student.eval()
        one = torch.ones((1, 1), dtype=torch.long, device=student.lm_head.weight.device)
        with torch.no_grad():
            student(input_ids=one, decoder_input_ids=one)
    finally:
        for hook in hooks:
            hook.remove()
        student.train(was_training)
    ratio = float(seen["in"].double().norm() / seen["out"].double().norm())
    candidates = (1.0, float(student.config.d_model) ** -0.5)
    return float(min(candidates, key=lambda value: abs(value - ratio)))


def is_tied(student: Any) -> bool:
    """Return whether the LM head is the embedding itself."""
    return bool(student.get_output_embeddings().weight is student.get_input_embeddings().weight)


def cache_options(student: Any) -> dict[str, Any]:
    """Return arguments of ``generate`` that a decoder deeper than its encoder needs.

    transformers 4.57 sizes the cache by the encoder's layers; a cache that grows by itself fits any decoder.
    """
    if student.config.num_decoder_layers <= student.config.num_layers:
        return {}
    from transformers import DynamicCache, EncoderDecoderCache

    return {"past_key_values": EncoderDecoderCache(DynamicCache(), DynamicCache())}


class TwoTaskModel(nn.Module):
    """The student and its loss ``L_label + lambda * L_rationale``.

    Args:
        student: ``T5ForConditionalGeneration`` or a relative, or a peft wrapper around one.
        rationale_weight: lambda.
        drawn_states: encoder states of a long input that a training step reads; None: all.
        options: passed on to the fused loss (``label_smoothing``, ``z_loss``, ``engine``, ...).

    """

    def __init__(
        self, student: Any, rationale_weight: float = 1.0, *, drawn_states: int | None = None, **options: Any
    ) -> None:
        super().__init__()
        self.drawn_states = drawn_states
        self.student = student
        self.segment_weights = (1.0, float(rationale_weight))
        self.options = options
        self.logit_scale = measure_logit_scale(self.core)

    @property
    def core(self) -> Any:
        """The transformers model itself, without a peft wrapper."""
        return self.student.get_base_model() if hasattr(self.student, "peft_config") else self.student

    def encode(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return encoder states (B, S, D) of token ids (B, S)."""
        encoder = self.core.get_encoder()
        out = encoder(input_ids=input_ids, attention_mask=attention_mask, return_dict=True)
        states: Tensor = out.last_hidden_state
        return states

    def decode(self, decoder_ids: Tensor, states: Tensor, attention_mask: Tensor) -> Tensor:
        """Return decoder states (B, T, D), before the scale of the LM head."""
        out = self.core.get_decoder()(
            input_ids=decoder_ids,
            encoder_hidden_states=states,
            encoder_attention_mask=attention_mask,
            use_cache=False,
            return_dict=True,
        )
        hidden: Tensor = out.last_hidden_state
        return hidden

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        decoder_ids: list[Tensor],
        targets: Tensor,
        segment_ids: Tensor,
        row_weights: Tensor,
        valid_indices: Tensor,
        denominators: Tensor | None = None,
        decoder_rows: list[Tensor] | None = None,
        state_index: Tensor | None = None,
        label_tokens: Tensor | None = None,
        label_exact: bool = False,
        row_losses: bool = False,
    ) -> dict[str, Tensor]:
        """Run both tasks and return their losses.

        Args:
            input_ids: (B, S), the rows of task 0 first, then those of task 1; with ``state_index`` their chunks.
            attention_mask: of the same shape.
            decoder_ids: for each task (R_k, T_k) decoder inputs.
            targets: (N,) with N = sum R_k T_k, -100 where padded.
            segment_ids: (N,) task of each position, plus 2 where the target is a further one of its row.
            row_weights: (N,) float weight of each position.
            valid_indices: (M,) positions whose target is real.
            denominators: (2,) sums of weights a task; see :func:`fused_linear_cross_entropy`. Needed with
                ``decoder_rows``.
            decoder_rows: for each task (R_k,) the encoder row of each decoder row, where a row has several
                targets; None: the encoder's rows in order.
            state_index: (B, N), for rows that are read in chunks: see :func:`sbs_edge.training.long.chunk_tensors`.
            label_tokens: (C,) token ids; adds ``scores`` (B_0, C), float32 logits of the first step.
            label_exact: adds ``exact`` (B_0,) bool: every target token of the label is the arg-max, so that greedy
                decoding gives exactly the target.
            row_losses: adds ``row_losses`` (R,), the mean loss of each decoder row of the last task.

        Returns:
            ``loss`` (), ``losses`` (2,), ``counts`` (2,), ``correct`` (2,), and the requested additions. Counts are
            of first targets only.

        """
        parts = 1 if decoder_rows is None else 2  # first targets; and further ones, which are not counted
        if parts == 2 and denominators is None:
            raise ValueError("Rows with several targets need denominators: a task's targets share one sum.")
        if state_index is None:
            states = self.encode(input_ids, attention_mask)
        else:
            if self.training and self.drawn_states is not None:
                state_index = draw_states(state_index, self.drawn_states)
            states, attention_mask = encode_chunks(self.encode, input_ids, attention_mask, state_index)
        hidden, start = [], 0
        for task, ids in enumerate(decoder_ids):
            rows = slice(start, start + ids.shape[0]) if decoder_rows is None else decoder_rows[task]
            hidden.append(self.decode(ids, states[rows], attention_mask[rows]))
            start += ids.shape[0]
        flat = torch.cat([part.reshape(-1, part.shape[-1]) for part in hidden])
        head = self.core.lm_head.weight
        if torch.is_autocast_enabled(flat.device.type):
            # The head's product in the low precision; the loss itself decides its own precisions.
            flat = flat.to(torch.get_autocast_dtype(flat.device.type))
        with torch.autocast(flat.device.type, enabled=False):
            loss = fused_linear_cross_entropy(
                flat,
                head,
                targets,
                segment_ids=segment_ids,
                n_segments=2 * parts,
                segment_weights=self.segment_weights * parts,
                row_weights=row_weights,
                valid_indices=valid_indices,
                denominators=None if denominators is None else denominators.repeat(parts),
                logit_scale=self.logit_scale,
                **self.options,
            )
        result = {
            "loss": loss.total,
            "losses": loss.losses.view(parts, 2).sum(0),
            "counts": loss.counts[:2],
            "correct": loss.correct[:2],
        }
        if label_tokens is not None:
            first = hidden[0][:, 0].float() * self.logit_scale
            result["scores"] = first @ head[label_tokens].float().t()
        if label_exact:
            label = hidden[0].float() * self.logit_scale
            wanted = targets[: label.shape[0] * label.shape[1]].view(label.shape[:2])
            # A few label tokens per row; only in evaluation, never in training.
            guess = (label @ head.float().t()).argmax(-1)
            result["exact"] = ((guess == wanted) | (wanted == -100)).all(1)
        if row_losses:
            n_rows, width = decoder_ids[-1].shape
            result["row_losses"] = fused_linear_cross_entropy(
                flat[-n_rows * width :],
                head,
                targets[-n_rows * width :],
                segment_ids=torch.arange(n_rows, device=flat.device).repeat_interleave(width),
                n_segments=n_rows,
                logit_scale=self.logit_scale,
                **self.options,
            ).losses
        return result


def build_student(config: TrainConfig, vocabulary: int) -> Any:
    """Return a T5 of the configured size with random weights; the vocabulary is rounded up to a multiple of 8."""
    from transformers import T5Config, T5ForConditionalGeneration

    student = T5ForConditionalGeneration(
        T5Config(
            vocab_size=-(-vocabulary // 8) * 8,
            d_model=config.d_model,
            d_kv=config.d_model // config.n_heads,
            d_ff=config.d_ff,
            num_heads=config.n_heads,
            num_layers=config.n_layers,
            num_decoder_layers=config.n_decoder_layers,
            dropout_rate=config.dropout or 0.0,
            feed_forward_proj="gated-gelu" if config.gated else "relu",
            tie_word_embeddings=config.tied,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    if not config.tied and is_tied(student):  # transformers 5 ties every head
        student.lm_head.weight = nn.Parameter(torch.randn_like(student.shared.weight))
        student.config.tie_word_embeddings = False
    return student


def add_lora(student: Any, rank: int, alpha: float | None) -> Any:
    """Freeze ``student`` and add LoRA adapters to its attention and feed-forward layers (peft)."""
    from peft import LoraConfig, get_peft_model

    names = {name.rsplit(".", 1)[-1] for name, _ in student.named_modules()}
    settings = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        target_modules=[layer for layer in LORA_LAYERS if layer in names],
        task_type="SEQ_2_SEQ_LM",
    )
    return get_peft_model(student, settings)


def merge_lora(student: Any) -> Any:
    """Return a plain transformers model with any adapters folded into its weights."""
    return student.merge_and_unload() if hasattr(student, "peft_config") else student
