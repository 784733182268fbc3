"""Remove a chat template's marks from an answer: thinking, channels, turns.

The server should remove them. If it does not, the student would learn them as part of a rationale or a label.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Unmarked", "unmark", "without_invisible"]

_WORDS = (
    r"(?:seed:|ant)?(?:think|thinking|thoughts?|thought_process|reasoning|reason|reflection|scratchpad|"
    r"analysis|chain_of_thought|cot|inner_monologue|internal_monologue|deliberation)"
)
_OPEN = re.compile(
    rf"<{_WORDS}\b[^<>]*>|\[(?:THINK|THINKING|REASONING)\]|◁think▷|<\|begin_of_thought\|>|<\|(?:START_)?THINKING\|>|"
    r"<unused94>(?:thought)?|<\|channel>\s*thought\b",
    re.IGNORECASE,
)
_CLOSE = re.compile(
    rf"</{_WORDS}\s*>|\[/(?:THINK|THINKING|REASONING)\]|◁/think▷|<\|end_of_thought\|>|<\|(?:END_|/)THINKING\|>|"
    r"<unused95>|<channel\|>",
    re.IGNORECASE,
)
# gpt-oss: <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...
_CHANNEL = re.compile(
    r"<\|channel\|>\s*(\w+)[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>"
    r"(.*?)(?=<\|(?:end|return|call|start|channel)\|>|\Z)",
    re.DOTALL,
)
# The same if the special tokens were dropped and their words left: analysisWe need ...assistantfinalThe ...
_BARE_CHANNEL = re.compile(r"\A(?:analysis|commentary)(?=[A-Z\"“'’])(.*?)(?:assistant\s*final|\Z)", re.DOTALL)
_PROSE = re.compile(
    r"\A\s*Here is my thought process:(.*?)Here is my response:", re.DOTALL | re.IGNORECASE
)  # Granite
_START = re.compile(
    r"\A(?:<s>|<bos>|<\|begin_of_text\|>|<\|startoftext\|>|<\|START_OF_TURN_TOKEN\|>|<\|CHATBOT_TOKEN\|>|"
    r"<\|(?:im_start|start|start_of_role)\|>\s*(?:assistant|model)?(?:<\|end_of_role\|>)?|"
    r"<start_of_turn>\s*(?:model|assistant)?|<\|turn>\s*(?:model|assistant)?|<\|start_header_id\|>\s*assistant\s*<\|end_header_id\|>|"
    r"<\|(?:assistant|message)\|>|<｜Assistant｜>|\[/?INST\]|<\|START_RESPONSE\|>|\s)+",
    re.IGNORECASE,
)
_END = re.compile(
    r"<\|(?:im_end|im_start|eot_id|eom_id|eos|end|endoftext|end_of_text|end_of_turn|endofturn|return|start|call|"
    r"user|END_OF_TURN_TOKEN|END_RESPONSE|start_header_id|separator)\|>|</s>|<eos>|<pad>|<end_of_turn>|"
    r"<start_of_turn>|<turn\|>|<｜(?:end▁of▁sentence|User)｜>|<EOT>|\[EOS\]|\[/?INST\]|\[/s\]",
    re.IGNORECASE,
)
_WRAPPER = re.compile(
    r"</?(?:answer|final_answer|response|output|solution)>|<\|(?:begin|end)_of_solution\|>|◁/?answer▷",
    re.IGNORECASE,
)
# An unknown mark: a special token anywhere, or a tag that opens the text or closes nothing.
_SPECIAL = re.compile(
    r"<\|[^\s<>|]{1,40}\|?>|<[^\s<>|]{1,40}\|>|<｜[^\s<>]{1,40}｜>|◁[^\s◁▷]{1,40}▷|<unused\d+>"
)
_TAG = re.compile(r"\A\s*(?:<([A-Za-z][\w:-]*)>|\[([A-Z][A-Z_]+)\])")
_CLOSING = re.compile(r"</([A-Za-z][\w:-]*)\s*>|\[/([A-Z][A-Z_]+)\]")
_HTML = re.compile(
    r"a|b|blockquote|body|br|center|code|d[dlt]|del|div|em|font|form|h[1-6r]|head|html|i|img|input|ins|kbd|label|li|"
    r"mark|ol|p|pre|q|s|section|small|span|strike|strong|su[bp]|table|tbody|t[dhrt]|title|u|ul",
    re.IGNORECASE,
)


class Unmarked(NamedTuple):
    """The answer without marks; ``reason`` if it cannot be used; ``ended`` if a mark ended the turn.

    ``thought`` is the text between the marks of thinking.
    """

    text: str
    reason: str | None = None
    ended: bool = False
    thought: str = ""


def unmark(text: str, keep: Sequence[str] = (), names: Sequence[str] = ()) -> Unmarked:
    """Return the part of the answer that is meant for the user.

    Thinking is kept apart, without its marks. An answer cannot be used if thinking is opened and never closed
    (``thought-unfinished``), if there is only thinking (``thought-only``), or if a mark is unknown
    (``unknown-mark: <name>``), because it would be read as a part of the rationale.

    Args:
        text: what came.
        keep: the task's own words (answer marker, labels); a mark in one of them is left alone.
        names: further names of marks around thought, such as ``musing`` for ``<musing>...</musing>``.

    """
    own = "\n".join(keep)
    text = without_invisible(text)
    ended = False
    thought = ""
    if "<|channel|>" in text:
        channels = _CHANNEL.findall(text)
        final = [body for name, body in channels if name == "final"]
        thought = "\n".join(body.strip() for name, body in channels if name != "final")
        if not final:
            return Unmarked("", "thought-unfinished", thought=thought)
        text = final[-1]
    bare = _BARE_CHANNEL.match(text)
    if bare is not None:
        thought = bare[1].strip()
        if not bare[0].endswith("final"):
            return Unmarked("", "thought-unfinished", thought=thought)
        text = text[bare.end() :]
    text = _START.sub("", text)
    if (prose := _PROSE.match(text)) is not None:
        text, thought = text[prose.end() :], prose[1].strip()
    marks = _thought_marks(text, own, names)
    if marks:
        text, thought, unfinished = _without_thought(text, marks)
        if unfinished:
            return Unmarked("", "thought-unfinished", thought=thought)
        text = _START.sub("", text)
    for found in _END.finditer(text):
        if found[0] not in own:
            text, ended = text[: found.start()], True
            break
    text = _WRAPPER.sub(lambda found: found[0] if found[0] in own else "\n", text).strip()
    if marks and not text:
        return Unmarked("", "thought-only", thought=thought)
    if (name := _unknown(text, own)) is not None:
        return Unmarked(text, f"unknown-mark: {name}", thought=thought)
    return Unmarked(text, None, ended, thought)


def without_invisible(text: str) -> str:
    """Drop control and format characters, except the two joiners, which scripts and emoji need."""
    return "".join(
        c
        if c in "\n\t\u200c\u200d" or unicodedata.category(c) not in ("Cc", "Cf")
        else "\n"
        if c in "\r\x0b\x0c\x85"
        else ""
        for c in text.replace("\r\n", "\n")
    )


def _thought_marks(text: str, own: str, names: Sequence[str]) -> list[tuple[int, int, int]]:
    """Return (begin, end, 1 or -1) of every mark that opens or closes thought, in order."""
    spelled = "|".join(re.escape(name) for name in names)
    openings, closings = [_OPEN], [_CLOSE]
    if names:
        openings.append(re.compile(rf"<(?:{spelled})>|\[(?:{spelled})\]", re.IGNORECASE))
        closings.append(re.compile(rf"</(?:{spelled})>|\[/(?:{spelled})\]", re.IGNORECASE))
    return sorted(
        {
            (found.start(), found.end(), step)
            for patterns, step in ((openings, 1), (closings, -1))
            for pattern in patterns
            for found in pattern.finditer(text)
            if found[0] not in own
        }
    )


def _without_thought(text: str, marks: Sequence[tuple[int, int, int]]) -> tuple[str, str, bool]:
    """Return the text without thought, the thought, and whether it was left open."""
    kept: list[str] = []
    thought: list[str] = []
    start, is_open = 0, False
    for begin, end, step in marks:
        between = text[start:begin]
        if step > 0:
            (thought if is_open else kept).append(between)
            is_open = True  # a model that quotes the opening mark in its thought closes it once
        elif is_open:
            thought.append(between)
            is_open = False
        else:  # opened in the prompt's template: everything before it is thinking
            thought += [*kept, between]
            kept.clear()
        start = end
    (thought if is_open else kept).append(text[start:])
    said = "\n".join(piece.strip() for piece in thought if piece.strip())
    return "" if is_open else "\n".join(kept).strip(), said, is_open


def _unknown(text: str, own: str) -> str | None:
    for found in _SPECIAL.finditer(text):
        if found[0] not in own:
            return found[0]
    opened = _TAG.match(text)
    if opened is not None:
        name = opened[1] or opened[2]
        closing = f"</{name}" if opened[1] else f"[/{name}"
        if (
            opened[0].strip() not in own
            and not _HTML.fullmatch(name)
            and (closing in text or text[opened.end() :].lstrip(" ").startswith("\n"))
        ):
            return opened[0].strip()
    for found in _CLOSING.finditer(text):
        name = found[1] or found[2]
        opening = f"<{name}" if found[1] else f"[{name}]"
        if found[0] not in own and opening not in text and not _HTML.fullmatch(name):
            return found[0]
    return None
